"""From what the command line names to an agent and what it was trained on; a zip of SB3's only if it is trusted."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from srwm_rl.errors import UserError
from srwm_rl.scripts.config.foreign_settings import allow_env, check_environment, read_settings
from srwm_rl.scripts.config.settings import TrainConfig

if TYPE_CHECKING:
    from srwm_rl.agents.evaluation.play_levels import Predictor
    from srwm_rl.scripts.commands.eval import EvalConfig

ZIP = b"PK\x03\x04"
KEYS: dict[str, Literal["action", "reward", "step"]] = {
    "previous_action": "action",
    "previous_reward": "reward",
    "episode_step": "step",
}


def open_agent(config: EvalConfig, device: str) -> tuple[Predictor, TrainConfig, int]:
    """Return the agent that the command line names, what it was trained on, and for how many steps.

    Args:
        config: the path, and with a zip `trust`, `env`, `train_levels` and `eval_levels`.
        device: where the agent computes.

    Raises:
        UserError: it is none, is not trusted, or does not fit its environment.
    """
    path = Path(config.run)
    if _is_zip(path):
        return _open_zip(config, device)
    if config.trust:
        raise UserError(f"--trust is for zips that model.save() wrote; {path} needs none, leave it out")
    from srwm_rl import load

    agent = load(path, device)
    source = str(agent.path)
    trained = read_settings(agent.config, source)
    allow_env(trained.env, config.env, source)
    if config.env not in (None, trained.env):
        raise UserError(f"--env {config.env}: {path} was trained on {trained.env}; leave it out")
    check_environment(trained, agent.policy.observation_space, agent.policy.action_space, source)
    return agent, trained, agent.num_timesteps


def _is_zip(path: Path) -> bool:
    try:
        with path.open("rb") if path.is_file() else BytesIO() as file:
            return file.read(len(ZIP)) == ZIP
    except OSError:  # whoever reads it next says what is wrong with it
        return False


def _open_zip(config: EvalConfig, device: str) -> tuple[Predictor, TrainConfig, int]:
    path = config.run
    if not config.trust:
        raise UserError(
            f"{path} is a zip such as model.save() writes, and reading it runs whatever code is in it; "
            "if you trust whoever made it, add --trust"
        )
    if config.env is None or config.train_levels in (None, "none") or not config.eval_levels:
        raise UserError(f"{path} does not say what it was trained on: give --env, --train-levels and --eval-levels")
    from srwm_rl.nn.policy import SRWMPolicy

    try:
        model = _algorithm(path).load(path, device=device)
    except Exception as error:  # it may hold anything
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {reason:.200}") from error
    if not isinstance(model.policy, SRWMPolicy):
        raise UserError(f"{path} holds a {type(model.policy).__name__}; only an SRWMPolicy can be evaluated here")
    trained = _settings(model, config.env, str(config.train_levels), config.eval_levels[0])
    check_environment(trained, model.observation_space, model.action_space, path)
    return model, trained, model.num_timesteps


def _algorithm(path: str) -> Any:
    """Return the class that wrote a zip, by the names of its settings; they are read as JSON, nothing is unpickled."""
    from sb3_contrib import RecurrentPPO

    from srwm_rl.agents import IMPALA, PPO

    with zipfile.ZipFile(path) as archive:
        names = json.loads(archive.read("data")).keys()
    if "vtrace_lambda" in names:
        return IMPALA
    return PPO if "sequence_length" in names else RecurrentPPO


def _settings(model: Any, env: str, levels: str, eval_levels: str) -> TrainConfig:
    """Describe what a model was trained on; the memory inputs are read off its observations."""
    parts = dict(getattr(model.observation_space, "spaces", {}))
    reward = parts.get("previous_reward")
    clip = float(reward.high.max()) if reward is not None else 0.0
    return TrainConfig(
        env=env,
        core=model.policy.core_name,
        levels=levels,
        eval_levels=eval_levels,
        inputs=tuple(name for key, name in KEYS.items() if key in parts),
        reward_clip=clip if clip < float("inf") else 0.0,
    )
