"""The command line's defaults for use from Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from stable_baselines3.common.vec_env import VecEnv

from srwm_rl.errors import check_settings
from srwm_rl.nn.cores import import_core
from srwm_rl.scripts.config.defaults import defaults, with_defaults
from srwm_rl.scripts.config.settings import KWARGS, TrainConfig
from srwm_rl.scripts.config.tuned import default_preset
from srwm_rl.scripts.training import build


@dataclass(frozen=True)
class TrainingDefaults:
    """How `srwm-rl train` would train in an environment; made by `srwm_rl.scripts.defaults_for`.

    Attributes:
        config: the settings, under the names of the command line's options.
    """

    config: TrainConfig

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments of `PPO` (or the other trainer) beside the policy and the environments."""
        return build.trainer_kwargs(self.config)

    @property
    def n_timesteps(self) -> int:
        """Environment steps in all."""
        return self.config.n_timesteps

    def make_env(self) -> VecEnv:
        """Make the training environments, with memory inputs and scaled rewards."""
        return build.make_env(self.config)


def defaults_for(
    env: str,
    *,
    core: str = TrainConfig.core,
    algo: Literal["ppo", "impala", "supervised"] = "ppo",
    preset: str | None = None,
    **changes: Any,
) -> TrainingDefaults:
    """Return the settings with which `srwm-rl train --env ENV` trains, tuned for each kind of environment.

    ```python
    from srwm_rl.agents import PPO
    from srwm_rl.scripts import defaults_for

    defaults = defaults_for("CartPole-v1", seed=1)
    model = PPO("SRWMPolicy", defaults.make_env(), **defaults.kwargs)
    model.learn(defaults.n_timesteps)
    ```

    is what `srwm-rl train --env CartPole-v1 --seed 1` trains, update by update, with as many threads.

    Args:
        env: as after `--env`: a game, a task, or a Gymnasium id.
        core: name of the core, `my_module:MyCore` for one of your own, which is imported.
        algo: the trainer; the command line trains `fewshot` with "supervised" unless another is chosen.
        preset: a set of defaults for a purpose; "tuned": those that a search found for the environment and the core,
            the default where they come with the package; "none": neither.
        changes: other options by name, such as `n_envs=8` or `core_kwargs={"hidden_size": 32}`, which is merged with
            the defaults.

    Raises:
        UserError: an unknown environment, preset or option, or a value out of range.
    """
    if ":" in core:
        import_core(core)
    check_settings("defaults_for", changes, [field.name for field in fields(TrainConfig)])
    preset = preset or default_preset(env, core, algo, changes)
    texts = {name: _texts(changes[name]) for name in KWARGS if name in changes}
    default = defaults(env, preset, core, algo, atari=bool(changes.get("atari")))
    config = with_defaults(replace(default, core=core, algo=algo, **changes | texts), default)
    return TrainingDefaults(replace(config, n_groups=build.groups_of_new_run(config)))


def _texts(settings: Any) -> tuple[str, ...]:
    """Return settings by name as the command line's `name:value` texts."""
    if not isinstance(settings, Mapping):
        return tuple(settings)
    return tuple(f"{name}:{value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items())
