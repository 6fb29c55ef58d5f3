"""A run's agent as a zip, as its trainer's `save` writes it, without the environments."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import gymnasium
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

    class Spaces(gymnasium.Env):  # all that a trainer's constructor uses
        observation_space, action_space = policy.observation_space, policy.action_space

    precision: Any = policy.encoder_kwargs.get("precision", "float32")  # "auto" depends on the machine
    venv: Any = DummyVecEnv([Spaces] * trained.n_envs)
    venv.has_answers = True
    model = make_model(replace(trained, device="cpu", precision=precision), venv)
    if _description(model.policy) != _description(policy):
        raise UserError(f"{agent.path} contradicts itself: the settings of its run build another policy than it holds")
    load_policy_arrays(model.policy, policy_arrays(policy), str(agent.path))
    model.num_timesteps = agent.num_timesteps
    file = BytesIO()
    model.save(file)
    read_back = type(model).load(BytesIO(file.getvalue()), device="cpu").policy
    if _description(read_back) != _description(policy) or _weights(read_back) != _weights(policy):
        raise UserError(f"{agent.path} cannot be written as a zip: it is read back as another policy")
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


def _weights(policy: SRWMPolicy) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in policy_arrays(policy).items()}
