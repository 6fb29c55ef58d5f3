"""A run's agent as a zip, as its trainer's `save` writes it, without the environments."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from srwm_rl.errors import UserError
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.build import make_model
from srwm_rl.storage.model_file import Agent, load_policy_arrays, policy_arrays
from srwm_rl.storage.safe_file import write_whole


def write_zip(path: Path, agent: Agent, trained: TrainConfig) -> list[str]:
    """Write an agent as a zip that its trainer's `load` reads, and return lines that describe it.

    Raises:
        UserError: the run's settings build another policy, or the zip read back holds another one.
    """
    policy = agent.policy
    make_env = partial(_spaces_only, policy.observation_space, policy.action_space)
    env = DummyVecEnv([make_env] * trained.n_envs)
    precision: Any = policy.encoder_kwargs.get("precision", "float32")  # "auto" depends on the machine
    model = make_model(replace(trained, device="cpu", precision=precision), env)
    if _description(model.policy) != _description(policy):
        raise UserError(f"{agent.path} contradicts itself: the settings of its run build another policy than it holds")
    load_policy_arrays(model.policy, policy_arrays(policy), str(agent.path))
    model.num_timesteps = agent.num_timesteps
    file = BytesIO()
    model.save(file)
    _check(type(model).load(BytesIO(file.getvalue()), device="cpu").policy, agent)
    write_whole(path, file.getvalue())
    return [
        f"  load it   srwm_rl.agents.{type(model).__name__}.load({str(path)!r})",
        "  warning   such a zip runs code when it is loaded: keep it for your own use; a model file or an ONNX file is "
        "safe to share",
    ]


def _description(policy: SRWMPolicy) -> tuple[Any, ...]:
    settings = policy.settings()
    encoder_kwargs = {"precision": "float32", **settings["encoder_kwargs"]}
    return {**settings, "encoder_kwargs": encoder_kwargs}, policy.observation_space, policy.action_space


def _spaces_only(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> gymnasium.Env:
    """Return an environment with nothing but its spaces, which is all that a trainer's constructor uses."""
    env: gymnasium.Env = gymnasium.Env()
    env.observation_space, env.action_space = observation_space, action_space
    return env


def _check(policy: SRWMPolicy, agent: Agent) -> None:
    expected, arrays = policy_arrays(agent.policy), policy_arrays(policy)
    equal = expected.keys() == arrays.keys() and all(np.array_equal(expected[name], arrays[name]) for name in expected)
    if not equal or _description(policy) != _description(agent.policy):
        raise UserError(f"{agent.path} cannot be written as a zip: it is read back as another policy")
