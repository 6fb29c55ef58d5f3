"""Compare an exported graph with its policy: both compute the same steps, each with its own core state."""

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
from srwm_rl.onnx_export import NEW_STATE, ActingStep, float32_copy

TOLERANCE = 1e-4
# Differences are relative to the output's largest number, or to this (of other outputs 1) if larger. States can be
# small: an SRWM with small edits carries thousandths, and relative to 1 even wrong states would pass.
FLOORS = {NEW_STATE: 1e-2}
STEPS = 48
RESET_EVERY = 12  # steps between additional episode starts, since episodes can be long
Arrays = dict[str, npt.NDArray[Any]]


class Comparison(NamedTuple):
    """The result of a check."""

    steps: int
    n_envs: int
    episode_starts: int
    differences: dict[str, float]
    """By output, the largest relative difference."""

    @property
    def passed(self) -> bool:
        """Whether every difference is within `TOLERANCE`."""
        return all(difference <= TOLERANCE for difference in self.differences.values())

    def __str__(self) -> str:
        """Return the differences."""
        return ", ".join(f"{name} {difference:.1e}" for name, difference in self.differences.items())


class OnnxRunner:
    """Runs an exported acting step in onnxruntime and carries its core state from step to step."""

    def __init__(self, content: bytes, step: ActingStep, n_envs: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._graph = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._step, core = step, step.policy.core
        self.state = np.zeros((core.state_layers, n_envs, core.state_size), np.float32)

    def step(self, obs: Arrays, starts: npt.NDArray[Any]) -> Arrays:
        """Run over observations `[B, ...]` and `starts` `[B]`; return the outputs and keep the new state."""
        arrays = (*(obs[key] for key in self._step.keys), self.state, starts)
        ports = zip(self._step.inputs, arrays, strict=True)
        inputs = {port.name: np.ascontiguousarray(array, port.dtype) for port, array in ports}
        names = [port.name for port in self._step.outputs]
        outputs: Arrays = dict(zip(names, self._graph.run(names, inputs), strict=True))
        self.state = outputs[NEW_STATE]
        return outputs


def check_onnx(content: bytes, step: ActingStep, policy: SRWMPolicy, env: VecEnv, n_steps: int = STEPS) -> Comparison:
    """Play with a policy, and run its exported graph on the same observations.

    The graph runs for all environments together, and for the first one alone. Episode starts are added to those of the
    environments. The policy's CNN computes in float32, as the graph's does.
    """
    policy, n, space = float32_copy(policy), env.num_envs, policy.action_space
    runners = OnnxRunner(content, step, n), OnnxRunner(content, step, 1)
    state, starts, n_starts = policy.initial_state(n), np.ones(n, bool), 0
    differences: dict[str, float] = {}
    obs = env.reset()
    for t in range(n_steps):
        starts = starts | ((t + np.arange(n)) % RESET_EVERY == RESET_EVERY - 1)
        n_starts += int(starts.sum())
        diagnostics = introspect(policy, obs_as_tensor(obs, policy.device), state, torch.as_tensor(starts))  # type: ignore[arg-type]
        state = diagnostics.core_state
        parts: Any = obs if isinstance(obs, dict) else {MAIN_KEY: obs}
        for runner in runners:
            rows = slice(runner.state.shape[1])
            outputs = runner.step({key: value[rows] for key, value in parts.items()}, starts[rows])
            for (name, output), expected in zip(outputs.items(), _expected(diagnostics, space), strict=True):
                expected = expected[:, rows] if name == NEW_STATE else expected[rows]
                difference = _difference(output, expected, FLOORS.get(name, 1.0))
                differences[name] = max(differences.get(name, 0.0), difference)
        actions = diagnostics.actions.numpy()
        obs, _, starts, _ = env.step(actions.clip(space.low, space.high) if isinstance(space, spaces.Box) else actions)
    return Comparison(n_steps, n, n_starts, differences)


def _expected(diagnostics: StepDiagnostics, space: spaces.Space[Any]) -> list[npt.NDArray[Any]]:
    """Return the expected outputs of the graph, in its order."""
    choices = [diagnostics.choices]
    if diagnostics.std is not None:
        choices = [tensor.reshape(-1, *(space.shape or ())) for tensor in (diagnostics.choices, diagnostics.std)]
    return [tensor.numpy() for tensor in (*choices, diagnostics.values, diagnostics.core_state)]


def _difference(output: npt.NDArray[Any], expected: npt.NDArray[Any], floor: float) -> float:
    """Return the largest difference relative to the largest number or `floor`; infinity for NaN or another shape."""
    if output.shape != expected.shape:
        return float("inf")
    largest = max(floor, np.abs(expected).max(initial=0.0))
    difference = float(np.abs(output - expected).max(initial=0.0) / largest)
    return difference if np.isfinite(difference) else float("inf")
