"""`srwm-rl bench env`: our environment layer against ProcGen itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from srwm_rl.errors import UserError
from srwm_rl.scripts.benchmarks.measure import alternate, ratio, show_ratio, summary
from srwm_rl.scripts.benchmarks.options import Common


@dataclass(frozen=True)
class EnvBench(Common):
    """Time ProcGen through our layers against ProcGen itself: `srwm-rl bench env`."""

    env: str = "bigfish"
    """The game."""
    n_envs: int = 64
    """Environments that step together."""
    n_steps: int = 200
    """Steps per round."""


def run(config: EnvBench) -> dict[str, Any]:
    """Print the table and return it.

    Raises:
        UserError: no ProcGen, or the layers do not give what ProcGen gives.
    """
    from srwm_rl.envs import ProcgenVecEnv, VecMemoryInputs

    raw = _Raw(config)
    vec = ProcgenVecEnv(config.env, config.n_envs, "0:200", seed=0)
    inputs = VecMemoryInputs(ProcgenVecEnv(config.env, config.n_envs, "0:200", seed=0))
    actions = np.random.default_rng(0).integers(0, 15, (config.n_steps, config.n_envs)).astype(np.int32)
    for each in (vec, inputs):
        each.reset()
    _check(raw, vec, actions)
    sides = {
        "raw ProcGen": lambda: raw.play(actions),
        "ProcgenVecEnv": lambda: _play(vec, actions),
        "with memory inputs": lambda: _play(inputs, actions),
    }
    rates = alternate(sides, config.rounds)
    print(f"{config.env}, {config.n_envs} environments, {config.n_steps} steps a round, {config.rounds} rounds in turn")
    rows = []
    for name, found in rates.items():
        against = ratio(found, rates["raw ProcGen"])
        print(f"{name:<20} {summary(found)!s:>32} steps/s   x raw {show_ratio(against)}")
        rows.append({"name": name, "steps_per_second": summary(found)._asdict(), "ratio": against._asdict()})
    for env in (vec, inputs):
        env.close()
    return {"bench": "env", "env": config.env, "n_envs": config.n_envs, "rows": rows}


class _Raw:
    """ProcGen's own interface, as its makers use it."""

    def __init__(self, config: EnvBench) -> None:
        from srwm_rl.envs import ProcgenBatch

        # The same construction, then the simulator alone.
        self.batch = ProcgenBatch(config.env, config.n_envs, "0:200", seed=0)
        self.env = self.batch._env

    def play(self, actions: np.ndarray) -> int:
        for row in actions:
            self.env.act(row)
            self.env.observe()
            self.env.get_info()
        return int(actions.size)


def _play(env: Any, actions: np.ndarray) -> int:
    for row in actions:
        env.step(row)
    return int(actions.size)


def _check(raw: _Raw, vec: Any, actions: np.ndarray) -> None:
    for row in actions[:50]:
        raw.env.act(row)
        reward, frames, _ = raw.env.observe()
        obs, rewards, *_ = vec.step(row)
        if not (np.array_equal(reward, rewards) and np.array_equal(frames["rgb"], obs)):
            raise UserError("the environment layer does not give what ProcGen gives: nothing was timed")
