"""A run's agent as its trainer's `save` would write it, without the environments."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from io import BytesIO
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


def make_zip(agent: Agent, trained: TrainConfig) -> tuple[bytes, str]:
    """Return the content of a zip, and the name of the class in `srwm_rl.agents` whose `load` reads it.

    It is read again before it is returned.

    Raises:
        UserError: the run's settings do not build its policy, or the zip does not give it back.
    """
    policy, source = agent.policy, str(agent.path)
    # A trainer asks its environments for their spaces and number; these have nothing else.
    bare = partial(_bare_env, policy.observation_space, policy.action_space)
    env = DummyVecEnv([bare] * trained.n_envs)
    precision: Any = policy.encoder_kwargs.get("precision", "float32")  # not what "auto" would mean on this machine
    model = make_model(replace(trained, device="cpu", precision=precision), env)
    if _settings(model.policy) != _settings(policy):
        raise UserError(f"{source} contradicts itself: the settings of its run build another policy than it holds")
    load_policy_arrays(model.policy, policy_arrays(policy), source)
    model.num_timesteps = agent.num_timesteps
    file = BytesIO()
    model.save(file)
    _check(type(model).load(BytesIO(file.getvalue()), device="cpu"), agent)
    return file.getvalue(), type(model).__name__


def _settings(policy: SRWMPolicy) -> dict[str, Any]:
    settings = policy.settings()
    return {**settings, "encoder_kwargs": {"precision": "float32", **settings["encoder_kwargs"]}}


def _bare_env(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> gymnasium.Env:
    env: gymnasium.Env = gymnasium.Env()
    env.observation_space, env.action_space = observation_space, action_space
    return env


def _check(loaded: Any, agent: Agent) -> None:
    wanted, found = policy_arrays(agent.policy), policy_arrays(loaded.policy)
    same = wanted.keys() == found.keys() and all(np.array_equal(wanted[name], found[name]) for name in wanted)
    spaces_of = [(each.observation_space, each.action_space) for each in (loaded, agent.policy)]
    if not same or spaces_of[0] != spaces_of[1] or _settings(loaded.policy) != _settings(agent.policy):
        raise UserError(f"{agent.path} cannot be written as a zip: what is read back is another policy")
