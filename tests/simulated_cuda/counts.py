"""Launches, copies and waits of an acting step and of an IMPALA update, counted on simulated CUDA.

After a change: `python -m tests.simulated_cuda.counts > docs/results/gpu_counts.json`.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from tests.simulated_cuda.plugin import GPU

import numpy as np  # isort: skip  (the plugin loads torch)
from gymnasium import spaces  # isort: skip
from tests.agents.probe import collect_rollout, small_model  # isort: skip

OBSERVATIONS = spaces.Dict(frame=spaces.Box(0, 255, (8, 8, 3), np.uint8), vector=spaces.Box(-1, 1, (3,), np.float32))
N_GROUPS, N_STEPS, N_UPDATES = 2, 8, 4
NAMES = {
    "a copy to the device, not waiting": "copies in",
    "a copy to the host, not waiting": "copies out",
    "launches": "launches",
    "replays": "graphs",
}


def counted() -> Counter[str]:
    """Return the counts since the last call: copies each way, graphs, launches (with these), and waits of all kinds."""
    counts: Counter[str] = Counter()
    for what, n in GPU.take_counts().items():
        counts[NAMES.get(what, "waits")] += n
    return counts


def rounded(counts: Counter[str], n: int) -> dict[str, float]:
    return {name: round(counts[name] / n, 2) for name in (*NAMES.values(), "waits")}


def rollout(algo: str) -> dict[str, dict[str, float]]:
    """Return the counts per acting step of a group, and those of a rollout beside its steps per group."""
    model = small_model(algo, n_groups=N_GROUPS, n_steps=N_STEPS, device="cuda", observation_space=OBSERVATIONS)
    for _ in range(2):  # graphs are captured in the first
        collect_rollout(model, continued=model.num_timesteps > 0)
    in_steps, collect = Counter[str](), model._collect

    def counting(*args: Any) -> bool:
        before.update(counted())
        result: bool = collect(*args)
        in_steps.update(counted())
        return result

    before: Counter[str] = Counter()
    model._collect = counting
    counted()
    collect_rollout(model, continued=True)
    n_acts = N_GROUPS * (N_STEPS + (algo == "ppo"))  # PPO acts once more, for the values it bootstraps with
    return {"acting step": rounded(in_steps, n_acts), "rest of a rollout": rounded(before + counted(), N_GROUPS)}


def updates() -> dict[str, dict[str, float]]:
    """Return the counts per update of IMPALA's learner."""
    model = small_model("impala", n_steps=N_STEPS, device="cuda", synchronous=False, waiting_batches=100)
    totals = []
    for n in (1, N_UPDATES, 2 * N_UPDATES):  # the gradient is captured in the first
        for _ in range(n):
            _, callback = model._setup_learn(10**6, None, reset_num_timesteps=False)
            callback.on_training_start({}, {})
            assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        model.rollout_buffer.finish()
        counted()
        model._run_learner()
        model.rollout_buffer.check()
        totals.append(counted())
        model.rollout_buffer.open()
    totals[2].subtract(totals[1])
    counts = rounded(totals[2], N_UPDATES)
    del counts["launches"]  # an operation on a list of tensors, one launch on a GPU, is many here
    return {"update": counts}


def table() -> dict[str, Any]:
    """Return all counts."""
    return {"PPO": rollout("ppo"), "IMPALA": rollout("impala") | updates()}


if __name__ == "__main__":
    print(json.dumps(table(), indent=1))
