"""One of two processes of `test_distributed.py`: runs every scenario and writes the results to a file.

torchrun --nproc-per-node 2 -m tests.agents.two_processes FOLDER
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from srwm_rl.agents import IMPALA, PPO, ppo
from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.collecting.unroll_queue import Unrolls
from srwm_rl.agents.distributed import LostProcessError, ProcessGroup, RankInfo, init_processes
from srwm_rl.agents.engine.updates import DeferredUpdates
from srwm_rl.errors import FaultError
from srwm_rl.storage.model_file import policy_arrays
from srwm_rl.storage.safe_file import pack, write_file
from tests.agents.probe import Probe, collect_rollout, gradient_of, unroll_gradient, weight_vector

SMALL = {"core_kwargs": {"hidden_size": 16, "n_layers": 1}}
FIELDS = ("observations", "actions", "episode_starts", "values", "log_probs", "advantages", "returns")
NON_FINITE = ("ppo", "late_ppo", "impala")  # late: an update's statistics are read after all updates
T, B = 8, 3  # steps and environments of each process
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"n_steps": T, "batch_size": T * B, "ent_coef": 0.01, "vf_coef": 0.01, "n_epochs": 2},
    "impala": {"n_steps": T, "synchronous": True},
}


class Slow(Probe):
    """An environment that is slow."""

    def step(self, action: Any) -> Any:
        time.sleep(0.002)
        return super().step(action)


def build(algo: str, n_envs: int = B, seed: int = 0, slow: bool = False, **settings: Any) -> Any:
    trainer: Any = {"ppo": PPO, "impala": IMPALA}[algo]
    env = DummyVecEnv([lambda: Monitor((Slow if slow else Probe)(length=5)) for _ in range(n_envs)])
    settings = {**SETTINGS[algo], **settings}
    return trainer("SRWMPolicy", env, seed=seed, device="cpu", **{"policy_kwargs": SMALL, **settings})


def weights(model: Any) -> np.ndarray:
    return weight_vector(model).numpy()


def gradient(model: Any) -> np.ndarray:
    return torch.cat([parameter.grad.flatten() for parameter in model.policy.parameters()]).numpy().copy()


def gradients(algo: str, processes: ProcessGroup) -> dict[str, Any]:
    """Collect a rollout with different data in each process, and sum the gradient over both."""
    model = build(algo, seed=processes.rank)
    model.join(processes)
    rollout = collect_rollout(model)
    rollout = rollout.tensors if algo == "ppo" else rollout
    log_probs = rollout.log_probs
    log_probs.add_(0.3 * torch.randn_like(log_probs))  # those of another policy
    if algo == "impala":
        terms, norm = unroll_gradient(model, rollout)
        data = rollout.to_tree()
    else:
        rollout.advantages.mul_(1 + 4 * processes.rank).add_(100 + 3 * processes.rank)  # no two means are the same
        terms, norm = gradient_of(model, np.arange(B))
        data = {name: getattr(rollout, name).numpy().copy() for name in FIELDS}
        data["core_state"] = model.rollout_buffer.core_states.numpy().copy()
    terms = {name: term.item() for name, term in terms._asdict().items()}
    return {
        "rollout": data, "gradient": gradient(model), "norm": norm.item(), "terms": terms, "weights": weights(model),
        "timesteps": model.num_timesteps, "episodes": [episode["r"] for episode in model.ep_info_buffer],
    }  # fmt: skip


def learn_with_nan(algo: str, how: str, on_nan: str, processes: ProcessGroup) -> dict[str, Any]:
    """Learn while process 1 meets a single non-finite number."""
    model = build(algo.removeprefix("late_"), seed=processes.rank, on_nan=on_nan)
    if algo.startswith("late_"):
        ppo.make_updates = lambda *args, defer: DeferredUpdates(*args)
    model.join(processes)
    rollout = collect_rollout(model)
    if processes.rank == 1:
        _inject_nan(model, rollout, how)
    before = weights(model)
    try:
        _learn(model, rollout)
        message = ""
    except FaultError as fault:
        message = str(fault)
    return {"before": before, "after": weights(model), "skipped": model.nan_guard.skipped, "message": message}


def _inject_nan(model: Any, rollout: Any, how: str) -> None:
    evaluate: Callable[..., Any] = model.policy.evaluate_sequence
    calls = 0

    def once(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            return evaluate(*args)
        new = evaluate(*args)
        if how == "logits":
            return new._replace(log_probs=new.log_probs * torch.nan, entropy=new.entropy * torch.nan)
        return new._replace(values=new.values * torch.nan)

    model.policy.evaluate_sequence = once


def _learn(model: Any, rollout: Any) -> None:
    if isinstance(model, PPO):
        model.set_logger(Logger(None, []))
        model.train()
    else:
        model._update(rollout)
        model._update(rollout)


def messages(processes: ProcessGroup) -> dict[str, int]:
    """Count the messages of PPO's update of two epochs over minibatches of one sequence."""
    model = build("ppo", seed=processes.rank, batch_size=T)
    model.join(processes)
    rollout = collect_rollout(model)
    sent, send = 0, processes.sum_

    def counted(tensors: Any) -> None:
        nonlocal sent
        sent += 1
        send(tensors)

    processes.sum_ = counted  # type: ignore[method-assign]
    try:
        _learn(model, rollout)
    finally:
        processes.sum_ = send  # type: ignore[method-assign]
    steps = int(model.policy.optimizer.state_dict()["state"][0]["step"])
    return {"minibatches": steps, "messages": sent, "timesteps": model.num_timesteps}


def overlapped(processes: ProcessGroup) -> dict[str, Any]:
    """Learn while collecting; process 1 is slow, and process 0 has a batch queued more, as after a resume."""
    model = build("impala", seed=processes.rank, slow=processes.rank == 1, synchronous=False, batch_size=2 * T)
    remaining = []

    def decay(left: float) -> float:
        remaining.append(left)
        return 1e-3 * left

    model.learning_rate = decay
    model._setup_lr_schedule()
    model.join(processes)
    if processes.first:
        unrolls = Unrolls.empty(
            T, 2, model.observation_space, model.action_space, model.policy.initial_state(2), version=0
        )
        model.rollout_buffer.put(unrolls)
    total = 2 * B * T * 6 - 5  # no multiple of a rollout
    planned = model.planned_steps(total)
    model.learn(total)
    counts = {"updates": model._n_updates, "timesteps": model.num_timesteps, "planned": planned}
    return {"weights": weights(model), "remaining": remaining, **counts}


def abandoned(processes: ProcessGroup, done: Path) -> dict[str, Any]:
    """Abandon an operation that process 1 does not join, then try another."""
    if processes.rank == 1:
        while not done.exists():
            time.sleep(0.01)
        return {"messages": []}
    Timer(0.2, processes.abandon).start()
    messages = []
    for _ in range(2):
        try:
            processes.gather({})
        except LostProcessError as error:
            messages.append(str(error))
    done.touch()
    return {"messages": messages}


def main(folder: Path) -> None:
    """Run every scenario."""
    torch.set_num_threads(1)
    rank_info = RankInfo.of()
    processes = init_processes(rank_info, "cpu")
    values = torch.tensor([[1e6, 1e6 + 1.0], [1e6 + 2, 1e6 + 5]])[processes.rank]
    moments = processes.means_and_stds([values, values[:1], 1e-3 * values])
    first: RecurrentAlgorithm = build("ppo", seed=processes.rank)
    own = weights(first)
    first.join(processes)
    frozen = build("ppo", seed=processes.rank, policy_kwargs={"core_kwargs": {**SMALL["core_kwargs"], "frozen": "key"}})
    frozen.join(processes)
    mixed = [{"a": np.arange(3 + rank_info.rank), "b": [b"x" * rank_info.rank, None, 1.5, True]}, "text"]
    results: dict[str, Any] = {
        "moments": [[moment.item() for moment in pair] for pair in moments],
        "own_weights": own,
        "joined_weights": weights(first),
        "joined_frozen": policy_arrays(frozen.policy),
        "gathered": processes.gather(mixed),
        "all_gathered": processes.all_gather(mixed),
        "messages": messages(processes),
        "overlapped": overlapped(processes),
    }
    for algo in ("ppo", "impala"):
        results[algo] = gradients(algo, processes)
    for algo in NON_FINITE:
        for how in ("logits", "nan"):
            for on_nan in ("skip", "stop"):
                results[f"{algo}_{how}_{on_nan}"] = learn_with_nan(algo, how, on_nan, processes)
    processes.all_gather(None)
    results["abandoned"] = abandoned(processes, folder / "done")
    arrays, tree = pack(results)
    write_file(folder / f"{rank_info.rank}.safetensors", arrays, tree)
    os._exit(0)  # an ordinary exit would wait for the abandoned operation


if __name__ == "__main__":
    main(Path(sys.argv[1]))
