"""Does an exported graph act as the policy it was made of? Both play the same steps, each with its own memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from srwm_rl.nn.diagnostics import StepDiagnostics, introspect
from srwm_rl.nn.encoders import MAIN_KEY
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.onnx_export import (
    EPISODE_START,
    MEAN,
    NEW_STATE,
    PROBABILITIES,
    STATE,
    STD,
    VALUE,
    ActingStep,
    float32_copy,
)

TOLERANCE = 1e-4
# Where numbers are below these, a difference counts as if they were as large. A state is often small: an SRWM with
# gentle edits carries thousandths, of which even the wrong ones would be within the tolerance of 1.
FLOORS = {PROBABILITIES: 1.0, MEAN: 1.0, STD: 1.0, VALUE: 1.0, NEW_STATE: 1e-2}
STEPS = 48
RESET_EVERY = 12  # so that no check is without episode starts, however long the episodes are
Arrays = dict[str, npt.NDArray[Any]]


class Checked(NamedTuple):
    """What a check found."""

    steps: int
    n_envs: int
    episode_starts: int
    differences: dict[str, float]
    """By output, the largest difference over the output's largest number, or over its floor if that is larger."""

    @property
    def passed(self) -> bool:
        """Say whether every difference is within `TOLERANCE`."""
        return all(each <= TOLERANCE for each in self.differences.values())


class OnnxPlayer:
    """An exported acting step, run by onnxruntime, and the memory it carries from step to step.

    Args:
        content: of the file.
        step: what it was made of, for the names and shapes.
        n_envs: B.
    """

    def __init__(self, content: bytes, step: ActingStep, n_envs: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._graph = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._inputs = {port.name: port for port in step.inputs}
        self._keys = dict(zip(step.policy.obs_spaces, self._inputs, strict=False))
        layers, _, size = self._inputs[STATE].shape
        self.state = np.zeros((layers, n_envs, size), np.float32)  # type: ignore[arg-type]

    def step(self, obs: Arrays, starts: npt.NDArray[Any]) -> Arrays:
        """Run over observations `[B, ...]` and `starts` `[B]`; return the outputs and keep the new state."""
        given = {self._keys[key]: each for key, each in obs.items()} | {STATE: self.state, EPISODE_START: starts}
        feed = {name: np.ascontiguousarray(each, self._inputs[name].dtype) for name, each in given.items()}
        names = [each.name for each in self._graph.get_outputs()]
        outputs: Arrays = dict(zip(names, self._graph.run(names, feed), strict=True))
        self.state = outputs[NEW_STATE]
        return outputs


def check_onnx(content: bytes, step: ActingStep, policy: SRWMPolicy, env: VecEnv, n_steps: int = STEPS) -> Checked:
    """Play with a policy, and let its exported graph log_prob_and_entropy the same observations beside it.

    All environments go through the graph together, and the first one through it alone as well. Beside the episodes
    that end, each environment is told now and then that an episode starts. The policy's CNN computes in float32, as
    the graph's does.

    Args:
        content: the ONNX file's.
        step: what it was made of.
        policy: what that was made of.
        env: environments such as it was trained in.
        n_steps: steps to play.
    """
    policy, n = float32_copy(policy), env.num_envs
    players = OnnxPlayer(content, step, n), OnnxPlayer(content, step, 1)
    state, starts, n_starts = policy.initial_state(n), np.ones(n, bool), 0
    differences: dict[str, float] = {}
    obs = env.reset()
    for t in range(n_steps):
        starts = starts | ((t + np.arange(n)) % RESET_EVERY == RESET_EVERY - 1)
        n_starts += int(starts.sum())
        seen = introspect(policy, obs_as_tensor(obs, policy.device), state, torch.as_tensor(starts))  # type: ignore[arg-type]
        state = seen.core_state
        parts: Any = obs if isinstance(obs, dict) else {MAIN_KEY: obs}
        for player in players:
            rows = slice(player.state.shape[1])
            played = player.step({key: each[rows] for key, each in parts.items()}, starts[rows])
            for name, wanted in _outputs(seen, policy.action_space).items():
                wanted = wanted[:, rows] if name == NEW_STATE else wanted[rows]
                differences[name] = max(differences.get(name, 0.0), _difference(played[name], wanted, FLOORS[name]))
        obs, _, starts, _ = env.step(_playable(seen.actions.numpy(), policy.action_space))
    return Checked(n_steps, n, n_starts, differences)


def _outputs(seen: StepDiagnostics, space: spaces.Space[Any]) -> Arrays:
    """Return what the graph's outputs should be."""
    memory = {VALUE: seen.values.numpy(), NEW_STATE: seen.core_state.numpy()}
    if seen.std is None:
        return {PROBABILITIES: seen.choices.numpy(), **memory}
    shape = (-1, *(space.shape or ()))
    return {MEAN: seen.choices.reshape(shape).numpy(), STD: seen.std.reshape(shape).numpy(), **memory}


def _difference(ours: npt.NDArray[Any], wanted: npt.NDArray[Any], floor: float) -> float:
    """Return the largest difference over the largest number or `floor`; infinity where a number or shape is amiss."""
    if ours.shape != wanted.shape:
        return float("inf")
    if not wanted.size:
        return 0.0
    difference = float(np.abs(ours - wanted).max() / max(floor, np.abs(wanted).max()))
    return difference if np.isfinite(difference) else float("inf")


def _playable(actions: npt.NDArray[Any], space: spaces.Space[Any]) -> npt.NDArray[Any]:
    return np.clip(actions, space.low, space.high) if isinstance(space, spaces.Box) else actions
