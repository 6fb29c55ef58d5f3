"""The agent's previous action, reward and observation and the step within the episode as further observations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from srwm_rl.envs.batch import Array, FloatArray, Observation
from srwm_rl.envs.vec_env import StatefulVecEnv, Step
from srwm_rl.errors import UserError, did_you_mean

KEYS = {
    "action": "previous_action",
    "reward": "previous_reward",
    "step": "episode_step",
    "observation": "previous_observation",
}
"""Name of an input -> its key in the observation."""


class ActionEncoder:
    """Encodes actions as floats: one-hot per choice, bits unchanged, Box values flattened and clipped to their bounds.

    `space` is the Box of one encoded action, wide enough for the zeros that stand for "no action yet".
    """

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        if isinstance(action_space, spaces.Discrete):
            action_space = spaces.MultiDiscrete([action_space.n], start=[action_space.start])
        self._choices: Array | None = None  # the number of each column's choice, for one-hots
        if isinstance(action_space, spaces.MultiDiscrete):
            self._sizes, starts = action_space.nvec.ravel(), action_space.start.ravel()
            self._choices = np.concatenate([start + np.arange(n) for start, n in zip(starts, self._sizes, strict=True)])
        elif not isinstance(action_space, (spaces.Box, spaces.MultiBinary)):
            raise UserError(f"actions of type {type(action_space).__name__} cannot be an input; leave out 'action'")
        flat: Any = spaces.flatten_space(action_space)
        self._low, self._high = flat.low, flat.high
        low, high = np.minimum(flat.low, 0), np.maximum(flat.high, 0)
        self.space = spaces.Box(low.astype(np.float32), high.astype(np.float32))

    def encode(self, actions: Array) -> FloatArray:
        """Return `actions` `[n, ...]` as `[n, k]`."""
        flat = np.asarray(actions).reshape(len(actions), -1)
        if self._choices is None:
            return np.clip(flat, self._low, self._high).astype(np.float32)
        if len(self._sizes) > 1:
            flat = np.repeat(flat, self._sizes, axis=1)
        one_hot: FloatArray = (flat == self._choices).astype(np.float32)
        return one_hot


class ObservationEncoder:
    """Encodes observations other than images as one vector: discrete values as one-hots, all else flattened.

    `space` is the Box of one encoded observation, wide enough for the zeros that stand for "none yet". The entries of
    a Dict follow each other in the order of the space.

    Raises:
        UserError: If an observation is an image.
    """

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        single = not isinstance(observation_space, spaces.Dict)
        parts = {None: observation_space} if single else observation_space.spaces  # type: ignore[attr-defined]
        for part in parts.values():
            if isinstance(part, spaces.Box) and len(part.shape) == 3 and is_image_space(part):
                raise UserError(
                    "the previous observation cannot be an input where it is an image; leave out 'observation'"
                )
        self._encoders = {
            key: None if isinstance(part, spaces.Box) else ActionEncoder(part) for key, part in parts.items()
        }
        flat: list[Any] = [spaces.flatten_space(part) for part in parts.values()]
        low = np.concatenate([np.minimum(part.low, 0) for part in flat])
        high = np.concatenate([np.maximum(part.high, 0) for part in flat])
        self.space = spaces.Box(low.astype(np.float32), high.astype(np.float32))

    def encode(self, obs: Observation) -> FloatArray:
        """Return observations `[n, ...]` as `[n, k]`, a copy."""
        parts: Any = obs if isinstance(obs, dict) else {None: obs}
        rows = []
        for key, encoder in self._encoders.items():
            part = np.asarray(parts[key])
            rows.append(part.reshape(len(part), -1) if encoder is None else encoder.encode(part))
        return np.concatenate(rows, axis=1, dtype=np.float32)


class VecMemoryInputs(StatefulVecEnv, VecEnvWrapper):
    """Observations as a Dict, with the agent's previous action, reward and observation, and the step.

    The observation itself stands under "observation" (the same array, not a copy; the entries of a Dict observation
    keep their keys), beside `previous_action` float32 `[n, k]`, `previous_reward` float32 `[n, 1]`, `episode_step`
    float32 `[n, 1]` and `previous_observation` float32 `[n, k]`. All are 0 at an episode's first observation. A
    `terminal_observation` gets them too.

    Args:
        venv: The environments.
        inputs: Which of "action", "reward", "step" and "observation" to add.
        reward_clip: Rewards are clipped to +- this; None leaves them (the paper's RL code clips to 1).

    Raises:
        UserError: If an input is not known or its key is taken, `reward_clip` is not positive, or the previous
            observation is asked for where observations are images.
    """

    def __init__(
        self, venv: VecEnv, inputs: Sequence[str] = ("action", "reward", "step"), reward_clip: float | None = 1.0
    ) -> None:
        for name in inputs:
            if name not in KEYS:
                raise UserError(f"there is no memory input {name!r}{did_you_mean(str(name), KEYS)}")
        if reward_clip is not None and not reward_clip > 0:
            raise UserError(f"reward_clip must be above 0, or None for no clipping, not {reward_clip!r}")
        self.inputs = tuple(inputs)
        self.reward_clip = reward_clip
        self._encoder = ActionEncoder(venv.action_space) if "action" in self.inputs else None
        self._obs_encoder = ObservationEncoder(venv.observation_space) if "observation" in self.inputs else None
        super().__init__(venv, observation_space=self._space(venv.observation_space))
        self._clear()

    def _space(self, base: spaces.Space[Any]) -> spaces.Dict:
        clip = np.inf if self.reward_clip is None else self.reward_clip
        added = {"reward": spaces.Box(-clip, clip, (1,), np.float32), "step": spaces.Box(0.0, np.inf, (1,), np.float32)}
        if self._encoder is not None:
            added["action"] = self._encoder.space
        if self._obs_encoder is not None:
            added["observation"] = self._obs_encoder.space
        parts = dict(base.spaces) if isinstance(base, spaces.Dict) else {"observation": base}
        for name in self.inputs:
            if KEYS[name] in parts:
                raise UserError(f"the observation has a key {KEYS[name]!r} already; leave {name!r} out of the inputs")
            parts[KEYS[name]] = added[name]
        return spaces.Dict(parts)

    def _clear(self) -> None:
        widths = {KEYS[name]: self.observation_space[KEYS[name]].shape for name in self.inputs}  # type: ignore[index]
        self._extra = {key: np.zeros((self.num_envs, *shape), np.float32) for key, shape in widths.items()}
        self._steps = np.zeros(self.num_envs, np.int64)
        # The encoded present observation, where it is the next step's input.
        self._present: dict[str, FloatArray] = {}
        if self._obs_encoder is not None:
            self._present["present_observation"] = np.zeros_like(self._extra["previous_observation"])

    def reset(self) -> Observation:
        """Start new episodes everywhere and return their first observations."""
        obs = self.venv.reset()
        self._clear()
        self._keep(obs)  # type: ignore[arg-type]
        return self._join(obs, self._extra)  # type: ignore[arg-type]

    def step_async(self, actions: Array) -> None:
        """Pass the actions on and keep a copy."""
        self._last_actions = np.array(actions)
        self.venv.step_async(actions)

    def step_wait(self) -> Step:
        """Act, and return observations, rewards, dones and infos."""
        obs, rewards, dones, infos = self.venv.step_wait()
        self._steps += 1
        extra = self._inputs(rewards)
        ended = dones.nonzero()[0]
        if len(ended):
            for i in ended.tolist():
                if infos[i].get("terminal_observation") is not None:
                    row = {key: value[i].copy() for key, value in extra.items()}
                    infos[i]["terminal_observation"] = self._join(infos[i]["terminal_observation"], row)
            for value in extra.values():
                value[ended] = 0.0
            self._steps[ended] = 0
        self._extra = extra
        self._keep(obs)  # type: ignore[arg-type]
        return self._join(obs, extra), rewards, dones, infos  # type: ignore[arg-type]

    def _keep(self, obs: Observation) -> None:
        if self._obs_encoder is not None:
            self._present = {"present_observation": self._obs_encoder.encode(obs)}

    def _inputs(self, rewards: Array) -> dict[str, FloatArray]:
        extra: dict[str, FloatArray] = {}
        if self._encoder is not None:
            extra["previous_action"] = self._encoder.encode(self._last_actions)
        if "reward" in self.inputs:
            if self.reward_clip is not None:
                rewards = np.minimum(np.maximum(rewards, -self.reward_clip), self.reward_clip)
            extra["previous_reward"] = rewards.astype(np.float32)[:, None]  # a copy: zeroed where episodes end
        if "step" in self.inputs:
            extra["episode_step"] = self._steps.astype(np.float32)[:, None]
        if self._obs_encoder is not None:
            extra["previous_observation"] = self._present["present_observation"]  # replaced after each step
        return extra

    @staticmethod
    def _join(obs: Observation, extra: dict[str, FloatArray]) -> dict[str, Array]:
        return {**(obs if isinstance(obs, dict) else {"observation": obs}), **extra}

    def observe(self) -> Observation:
        """Return the current observations without stepping, as after `set_state`."""
        return self._join(self.venv.observe(), self._extra)  # type: ignore[attr-defined]

    def _arrays(self) -> dict[str, Array]:
        return {"steps": self._steps, **self._extra, **self._present}

    def _set_arrays(self, arrays: dict[str, Array]) -> None:
        self._steps = arrays.pop("steps")
        self._present = {key: arrays.pop(key) for key in self._present}
        self._extra = arrays
