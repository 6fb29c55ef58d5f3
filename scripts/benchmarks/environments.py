"""`srwm-rl bench env`: our ProcGen environments against ProcGen itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from srwm_rl.envs import ProcgenBatch, ProcgenVecEnv, VecMemoryInputs
from srwm_rl.errors import UserError
from srwm_rl.scripts.benchmarks.measure import alternate, format_ratio, ratio, summary
from srwm_rl.scripts.benchmarks.options import BenchOptions

BASELINE = "raw ProcGen"


@dataclass(frozen=True)
class EnvBench(BenchOptions):
    """Time our ProcGen environments against ProcGen itself: `srwm-rl bench env`."""

    env: str = "bigfish"
    """The game."""
    n_envs: int = 64
    """Environments that step together."""
    n_steps: int = 200
    """Steps per round."""


def run(config: EnvBench) -> dict[str, Any]:
    """Print the table and return it.

    Raises:
        UserError: ProcGen is not installed, or our environments differ from it.
    """
    settings: Any = {"n_envs": config.n_envs, "levels": "0:200", "seed": 0}
    raw = ProcgenBatch(config.env, **settings)._env
    vec = ProcgenVecEnv(config.env, **settings)
    inputs = VecMemoryInputs(ProcgenVecEnv(config.env, **settings))
    vec.reset()
    inputs.reset()
    actions = np.random.default_rng(0).integers(0, 15, (config.n_steps, config.n_envs)).astype(np.int32)
    _check_equal(raw, vec, actions[:50])
    sides = {
        BASELINE: partial(_play, partial(_step_raw, raw), actions),
        "ProcgenVecEnv": partial(_play, vec.step, actions),
        "with memory inputs": partial(_play, inputs.step, actions),
    }
    rates = alternate(sides, config.rounds)
    print(f"{config.env}, {config.n_envs} environments, {config.n_steps} steps a round, {config.rounds} rounds in turn")
    rows = []
    for name, values in rates.items():
        speed, relative = summary(values), ratio(values, rates[BASELINE])
        print(f"{name:<20} {speed!s:>32} steps/s   x raw {format_ratio(relative)}")
        rows.append({"name": name, "steps_per_second": speed._asdict(), "ratio": relative._asdict()})
    vec.close()
    inputs.close()
    return {"bench": "env", "env": config.env, "n_envs": config.n_envs, "rows": rows}


def _step_raw(env: Any, actions: np.ndarray) -> Any:
    """Step ProcGen through its own interface."""
    env.act(actions)
    observed = env.observe()
    env.get_info()
    return observed


def _play(step: Callable[[np.ndarray], Any], actions: np.ndarray) -> int:
    for row in actions:
        step(row)
    return int(actions.size)


def _check_equal(raw: Any, vec: Any, actions: np.ndarray) -> None:
    for row in actions:
        reward, frames, _ = _step_raw(raw, row)
        obs, rewards, *_ = vec.step(row)
        if not (np.array_equal(reward, rewards) and np.array_equal(frames["rgb"], obs)):
            raise UserError("our environments differ from ProcGen: nothing was timed")
