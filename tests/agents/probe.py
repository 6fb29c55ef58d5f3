"""A tiny environment, small models, one rollout and one gradient, for the trainers' tests."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import Tensor
from torch.utils import _pytree as pytree

from srwm_rl.agents import IMPALA, PPO
from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.collecting.unroll_queue import Unrolls
from srwm_rl.agents.engine.cuda_graphs import CheckedGraphs, copy_into
from srwm_rl.agents.losses.impala_loss import IMPALALossSums
from srwm_rl.agents.losses.ppo_loss import PPOLossSums
from srwm_rl.envs import GroupedVecEnv

Result = TypeVar("Result")
Graphs = TypeVar("Graphs", bound=CheckedGraphs)
PROBE_SETTINGS = ("observation_space", "action_space", "length", "cut")


class Probe(gymnasium.Env[Any, Any]):
    """Random observations of any space; step t pays t; episodes of `length` steps, truncated if `cut`."""

    def __init__(
        self, observation_space: Any = None, action_space: Any = None, length: int = 5, cut: bool = False
    ) -> None:
        # A copy: groups step in threads, and a shared space would be a shared random generator.
        self.observation_space = deepcopy(observation_space or spaces.Box(-1, 1, (3,), np.float32))
        self.action_space = action_space or spaces.Discrete(2)
        self.length, self.cut, self.t = length, cut, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.t += 1
        ended = self.t == self.length
        return self.observation_space.sample(), float(self.t), ended and not self.cut, ended and self.cut, {}


class FailingProbe(Probe):
    """Raises in the fourth step of an episode."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.t == 3:
            raise RuntimeError("the simulator is gone")
        return super().step(action)


class LogRecorder(KVWriter):
    """Records each step and what is logged, without the times."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.rows.append({"step": step} | {k: v for k, v in key_values.items() if not k.startswith("time/")})

    def column(self, key: str) -> list[Any]:
        return [row[key] for row in self.rows if key in row]


def probe_env(n_envs: int = 4, n_groups: int = 1, **probe: Any) -> VecEnv:
    groups = [DummyVecEnv([partial(Probe, **probe)] * (n_envs // n_groups)) for _ in range(n_groups)]
    return groups[0] if n_groups == 1 else GroupedVecEnv(groups)


def small_model(
    algo: str, env: VecEnv | None = None, n_layers: int = 1, n_envs: int = 4, n_groups: int = 1, **settings: Any
) -> Any:
    """Return a PPO or (synchronous) IMPALA model with a small network, on `env` or on probes.

    Args:
        algo: "ppo"; anything else is IMPALA.
        env: None: `n_envs` probes in `n_groups` groups.
        n_layers: of the core.
        settings: of the algorithm, and of `Probe`.
    """
    probe = {key: settings.pop(key) for key in PROBE_SETTINGS if key in settings}
    network = {"core_kwargs": {"hidden_size": 16, "n_layers": n_layers}, "encoder_kwargs": {"cnn": {"channels": [4]}}}
    settings = {
        "n_steps": 8,
        "seed": 0,
        "device": "cpu",
        **settings,
        "policy_kwargs": {**network, **settings.get("policy_kwargs", {})},
    }
    env = env or probe_env(n_envs, n_groups, **probe)
    if algo == "ppo":
        return PPO("SRWMPolicy", env, **settings)
    return IMPALA("SRWMPolicy", env, **{"synchronous": True, **settings})


def collect_rollout(model: Any, callback: BaseCallback | None = None, continued: bool = False) -> Any:
    """Collect one rollout without learning; return PPO's buffer or IMPALA's unrolls.

    Args:
        model: that collects.
        callback: of the user.
        continued: whether to go on from the environments' present state; else they are reset first.
    """
    _, callbacks = model._setup_learn(10**6, callback, reset_num_timesteps=not continued)
    callbacks.on_training_start({}, {})
    assert model.collect_rollouts(model.env, callbacks, model.rollout_buffer, model.n_steps)
    return model.rollout_buffer if isinstance(model, PPO) else model.rollout_buffer.take(model.n_envs)


class AddHooks(BaseCallback):
    """Adds a hook to the acting policy before some rollouts, so that its graphs are captured anew."""

    def __init__(self, rollouts: tuple[int, ...]) -> None:
        super().__init__()
        self.rollouts, self.number = rollouts, 0

    def _on_rollout_start(self) -> None:
        self.number += 1
        if self.number in self.rollouts:
            self.model.acting_policy.value_net.register_forward_hook(lambda *_: None)  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True


class StopAtMeanReturn(BaseCallback):
    """Ends training when the mean return of the last `stats_window_size` episodes is above a threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def _on_step(self) -> bool:
        episodes = self.model.ep_info_buffer or ()
        return len(episodes) < self.model._stats_window_size or mean_return(self.model) <= self.threshold


def mean_return(model: BaseAlgorithm) -> float:
    """Return the mean return of the last `stats_window_size` episodes."""
    return float(np.mean([episode["r"] for episode in model.ep_info_buffer or ()]))


def weight_vector(model: RecurrentAlgorithm) -> Tensor:
    """Return a copy of the policy's weights, flat and on the CPU."""
    return torch.cat([parameter.detach().cpu().flatten() for parameter in model.policy.parameters()])


def eager_graph(work: Callable[[], Result]) -> Callable[[], Result]:
    """Stand in for `cuda_graphs.capture`: `work` is called again at each replay, its results in the same tensors."""
    for _ in range(3):
        work()
    result: Any = pytree.tree_map(lambda leaf: None if leaf is None else torch.zeros_like(leaf), work())

    def replay() -> Result:
        copy_into(result, work())
        return result

    return replay


def capturing(graphs: Graphs, capture: Callable[[Callable[[], Any]], Callable[[], Any]] | None) -> Graphs:
    """Replace what captures a graph; None: keep it."""
    if capture is not None:
        graphs._make_graph = lambda work, device: capture(work)  # type: ignore[method-assign]
    return graphs


def gradient_of(model: PPO, sequences: np.ndarray) -> tuple[PPOLossSums, Tensor]:
    """Set the weights' `.grad` to the gradient of a minibatch of the rollout; return the loss sums and the norm."""
    buffer = model.rollout_buffer
    (stats,) = model.processes.means_and_stds([buffer.advantages_of(sequences)])
    stats = stats if model.normalize_advantage else None
    batches = buffer.gather(sequences, model.sequences_at_once(buffer.sequence_length), stats)
    n_steps = len(sequences) * buffer.sequence_length * model.processes.size
    sums = PPOLossSums(*model.engine.backward(batches, float(n_steps), 0.2, None))
    return sums, model._all_reduce(sums)


def unroll_gradient(model: IMPALA, batch: Unrolls) -> tuple[IMPALALossSums, Tensor]:
    """Set the weights' `.grad` to the gradient of a batch of unrolls; return the loss sums and the norm."""
    sums = IMPALALossSums(*model.engine.backward(model._parts(batch)))
    return sums, model._all_reduce(sums)
