"""`srwm-rl bench env`: our ProcGen environments against ProcGen itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from srwm_rl.envs import ProcgenBatch, ProcgenVecEnv, VecMemoryInputs
from srwm_rl.envs.procgen.simulator import Simulator
from srwm_rl.errors import UserError
from srwm_rl.scripts.benchmarks.measure import BenchOptions, alternate, ratio, speeds, summary
from srwm_rl.scripts.config.settings import Count

BASELINE = "raw ProcGen"


@dataclass(frozen=True)
class EnvBench(BenchOptions):
    """Time our ProcGen environments against ProcGen itself: `srwm-rl bench env`."""

    env: str = "bigfish"
    """The game."""
    n_envs: Count = 64
    """Environments that step together."""
    n_steps: Count = 200
    """Steps per round."""


def run(config: EnvBench) -> dict[str, Any]:
    """Print the table and return it.

    Raises:
        UserError: ProcGen is not installed, or our environments differ from it.
    """
    settings: Any = {"n_envs": config.n_envs, "levels": "0:200", "seed": 0}
    raw = ProcgenBatch(config.env, **settings)._simulator
    vec = ProcgenVecEnv(config.env, **settings)
    inputs = VecMemoryInputs(ProcgenVecEnv(config.env, **settings))
    vec.reset()
    inputs.reset()
    actions = np.random.default_rng(0).integers(0, 15, (config.n_steps, config.n_envs)).astype(np.int32)
    _check_equal(raw, vec, actions[:50])
    steps = {BASELINE: partial(_step_raw, raw), "ProcgenVecEnv": vec.step, "with memory inputs": inputs.step}
    plays = {name: {"steps": partial(_play, step, actions)} for name, step in steps.items()}
    sides = {name: partial(speeds, parts, actions.size) for name, parts in plays.items()}
    rates = alternate(sides, config.rounds)
    print(f"{config.env}, {config.n_envs} environments, {config.n_steps} steps a round, {config.rounds} rounds in turn")
    rows = []
    for name, parts in rates.items():
        speed, relative = summary(parts["steps"]), ratio(parts["steps"], rates[BASELINE]["steps"])
        print(f"{name:<20} {f'{speed:,.0f}':>32} steps/s   x raw {relative:.2f}")
        rows.append({"name": name, "steps_per_second": speed, "ratio": relative})
    vec.close()
    inputs.close()
    return {"bench": "env", "env": config.env, "n_envs": config.n_envs, "rows": rows}


def _step_raw(simulator: Simulator, actions: np.ndarray) -> Any:
    """Step ProcGen's library, and read what it tells of the levels."""
    simulator.act(actions)
    observed = simulator.observe()
    for key in ("level_seed", "prev_level_seed", "prev_level_complete"):
        simulator.info(key)
    return observed


def _play(step: Any, actions: np.ndarray) -> None:
    for row in actions:
        step(row)


def _check_equal(raw: Simulator, vec: Any, actions: np.ndarray) -> None:
    for row in actions:
        reward, frames, _ = _step_raw(raw, row)
        obs, rewards, *_ = vec.step(row)
        if not (np.array_equal(reward, rewards) and np.array_equal(frames, obs)):
            raise UserError("our environments differ from ProcGen: nothing was timed")
