"""`srwm-rl bench train`: steps per second of collecting, learning and both, the bound, and sb3-contrib beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from srwm_rl.errors import UserError
from srwm_rl.nn.encoders import MAIN_KEY
from srwm_rl.ops.backends import prefer
from srwm_rl.scripts.benchmarks.bound import make_batch, parts_of, share_of_bound, speeds_of
from srwm_rl.scripts.benchmarks.measure import Rate, device_clock, long_enough, ratio, show_ratio, summary
from srwm_rl.scripts.benchmarks.options import Common
from srwm_rl.scripts.benchmarks.overlap import learning_beside
from srwm_rl.scripts.config.defaults import defaults
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.build import describe_threads, groups_of_new_run, make_env, make_model, use_threads

if TYPE_CHECKING:
    from srwm_rl.agents.base import RecurrentAlgorithm
    from srwm_rl.nn.policy import SRWMPolicy

ComparedRuns = Callable[[], dict[str, float]]  # trains for a while and tells the steps per second of what it timed


@dataclass(frozen=True)
class TrainBench(Common):
    """Time training: `srwm-rl bench train`."""

    env: str = "bigfish"
    """A ProcGen game, a task, any Gymnasium id."""
    core: str = "srwm"
    """The agent's memory."""
    core_kwargs: tuple[str, ...] | None = None
    """Its settings as name:value, such as hidden_size:128; None: those of the environment's kind."""
    algo: Literal["ppo", "impala"] = "ppo"
    """The trainer; impala plays and learns in turn, unless it is overlapping."""
    overlapping: bool = False
    """Let impala learn beside its actors, as `srwm-rl train` does; only both together are timed."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """In which the CNN computes."""
    n_envs: int = 64
    """Environments that step together."""
    n_steps: int = 64
    """Steps per environment and update."""
    batch_size: int = 512
    """Steps per minibatch."""
    n_epochs: int = 3
    """Passes over each rollout (ppo)."""
    env_kwargs: tuple[str, ...] = ()
    """Settings of the environment, as name:value, such as a longer task."""
    against: Literal["sb3-contrib", "feedforward", "reference"] | None = None
    """Time another trainer in alternation: sb3_contrib.RecurrentPPO with the same encoder, an LSTM of as many units as
    our core is wide, and the same environments, epochs and batch; or our own PPO without a memory; or ours with the
    recurrence step by step in plain PyTorch."""
    device: str = "auto"
    """auto, cpu, cuda."""


def run(config: TrainBench) -> dict[str, Any]:
    """Print the table and return it.

    Raises:
        UserError: a mode that the trainer does not have, or a side that cannot be compared.
    """
    if config.overlapping and config.algo != "impala":
        raise UserError("--overlapping is impala's; give --algo impala")
    ours = _ours(config)
    _use_threads(config, ours, config.overlapping)
    sides = _sides(config, ours)
    print(
        f"{config.env}, core {config.core}, {config.algo}{' overlapping' if config.overlapping else ''}, "
        f"{config.n_envs} x {config.n_steps} steps, {_n_passes(config)} epoch(s), batch {config.batch_size}, "
        f"{ours.policy.features_extractor.describe()}; {ours.device}, {describe_threads()}"
    )
    rows, speeds = _measure(config, ours, sides)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, measured in rows.items():
        result[name] = {part: summary(each)._asdict() for part, each in measured.items()}
        said = "   ".join(f"{part} {summary(each)}" for part, each in measured.items())
        print(f"{name:<12} {said} steps/s")
    out: dict[str, Any] = {"bench": "train", "settings": _settings(config), "rows": result}
    apart = config.overlapping and ours.device.type == "cuda"
    out |= share_of_bound(rows["srwm-rl"]["both"], speeds, _n_passes(config), apart)
    for other in sides.keys() - {"srwm-rl"}:
        ratios: dict[str, Rate] = {part: ratio(rows["srwm-rl"][part], rows[other][part]) for part in rows[other]}
        print(f"x {other:<10} {'   '.join(f'{part} {show_ratio(each)}' for part, each in ratios.items())}")
        out["ratio"] = {part: each._asdict() for part, each in ratios.items()}
    if config.against == "sb3-contrib":
        memory = {name: _memory(config, name) for name in sides}
        out["peak_mib"] = memory
        print(f"peak memory  srwm-rl {memory['srwm-rl']:,.0f} MiB, sb3-contrib {memory['sb3-contrib']:,.0f} MiB")
    return out


def _use_threads(config: TrainBench, ours: RecurrentAlgorithm, overlapping: bool) -> None:
    at_once = config.n_envs if overlapping else 0
    use_threads(config.threads, ours.observation_space, at_once, on_gpu=ours.device.type == "cuda")


def _n_passes(config: TrainBench) -> int:
    return config.n_epochs if config.algo == "ppo" else 1


def _sides(config: TrainBench, ours: RecurrentAlgorithm) -> dict[str, ComparedRuns]:
    """Return our trainer and the one beside it, by name."""
    sides = {"srwm-rl": _side(config, ours)}
    if config.against == "sb3-contrib":
        sides["sb3-contrib"] = _side(config, _theirs(config, ours))
    elif config.against == "feedforward":
        sides["feedforward"] = _side(config, _ours(replace(config, core="feedforward")))
    elif config.against == "reference":
        slow = _ours(config)
        check_same(ours, slow)
        sides["reference"] = _side(config, slow, "reference")
    return sides


def _side(config: TrainBench, model: Any, backend: str = "auto") -> ComparedRuns:
    if config.overlapping:
        learn = learning_beside(model, backend)
        return lambda: {"both": learn()}
    update = _updater(model, backend)

    def train() -> dict[str, float]:
        steps, collecting, learning = update()
        return {"collect": steps / collecting, "learn": steps / learning, "both": steps / (collecting + learning)}

    return train


def _measure(
    config: TrainBench, ours: RecurrentAlgorithm, sides: dict[str, ComparedRuns]
) -> tuple[dict[str, dict[str, list[float]]], list[dict[str, float]]]:
    """Return each side's steps per second, and those of the bound's parts alone, by round; one more goes first."""
    rows: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in sides}
    speeds: list[dict[str, float]] = []
    for number in range(config.rounds + 1):
        for name, train in sides.items():
            for part, rate in train().items():
                if number:
                    rows[name][part].append(rate)
        if number == 0:
            parts = parts_of(ours, make_env(_train_config(config)), config.batch_size)
            continue
        # Beside each round: what else the machine does makes the parts slower as well. And each has all the cores.
        _use_threads(config, ours, overlapping=False)
        speeds.append(speeds_of(parts))
        _use_threads(config, ours, config.overlapping)
    return rows, speeds


def _settings(config: TrainBench) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name not in ("json", "verbose")}


def _train_config(config: TrainBench) -> TrainConfig:
    train: TrainConfig = defaults(config.env, None, config.core, config.algo)
    shared: dict[str, Any] = {
        "core": config.core,
        "precision": config.precision,
        "device": config.device,
        "n_envs": config.n_envs,
        "env_kwargs": config.env_kwargs,
    }
    if config.core_kwargs is not None:
        shared["core_kwargs"] = config.core_kwargs
    train = replace(train, **shared, n_steps=config.n_steps, batch_size=config.batch_size)
    train = replace(train, n_groups=groups_of_new_run(train))
    if config.algo == "ppo":
        return replace(train, n_epochs=config.n_epochs)
    return replace(train, synchronous=not config.overlapping)


def _ours(config: TrainBench) -> RecurrentAlgorithm:
    train = _train_config(config)
    return make_model(train, make_env(train))


def check_same(ours: RecurrentAlgorithm, slow: RecurrentAlgorithm) -> None:
    """See that both backends give the same values, log-probabilities and gradients for one unroll of random steps.

    Episodes end inside it.

    Raises:
        UserError: they do not; then no speed is worth printing.
    """
    slow.policy.load_state_dict(ours.policy.state_dict())
    policy, (n_steps, n) = ours.policy, (min(ours.n_steps, 50), 4)
    drawn = {key: _samples(space, n_steps, n) for key, space in policy.obs_spaces.items()}
    obs = ours.obs_tensor(drawn if isinstance(policy.observation_space, spaces.Dict) else drawn[MAIN_KEY])
    actions = torch.as_tensor(_samples(policy.action_space, n_steps, n), device=ours.device)
    starts = torch.as_tensor(np.random.default_rng(0).random((n_steps, n)) < 0.1, device=ours.device)
    found = []
    for model, backend in ((ours, "auto"), (slow, "reference")):
        each = model.policy
        with prefer(backend):
            state = each.initial_state(n)
            seen = model.engine.evaluate_sequence(obs, actions, state, starts, None)
            (seen.values.square().sum() + seen.log_probs.sum()).backward()
            gradient = _gradient_taken(each)
            batch, *scalars = make_batch(model, obs, actions, state, starts)
            model.engine.backward([batch], *scalars)
            found.append((seen.values, seen.log_probs, gradient, _gradient_taken(each)))
    for name, one, other in zip(("values", "log-probabilities", "gradients", "updates"), *found, strict=True):
        if (one - other).norm() > 1e-3 * other.norm():
            raise UserError(f"the fused kernel's {name} differ from the reference's; not timed")


def _gradient_taken(policy: SRWMPolicy) -> Tensor:
    """Take the weights' gradients away from them, and return them in one row."""
    row = torch.cat([each.grad.flatten() for each in policy.parameters() if each.grad is not None])
    policy.zero_grad()
    return row


def _samples(space: spaces.Space[Any], n_steps: int, n: int) -> np.ndarray:
    """Draw `[T, B, ...]` from a space, the same ones each time."""
    space.seed(0)
    drawn: np.ndarray = np.stack([space.sample() for _ in range(n_steps * n)])
    shaped: np.ndarray = drawn.reshape(n_steps, n, *drawn.shape[1:])
    return shaped


def _theirs(config: TrainBench, ours: RecurrentAlgorithm) -> Any:
    """Return RecurrentPPO as its users set it up, on environments of its own with the same layers around them."""
    if config.algo != "ppo":
        raise UserError("--against sb3-contrib compares PPO with PPO; leave out --algo")
    from sb3_contrib import RecurrentPPO

    from srwm_rl.envs.make import make_vec_env
    from srwm_rl.scripts.benchmarks.contrib import policy_kwargs

    if ours.policy.features_extractor.images:
        env = make_vec_env(config.env, config.n_envs, "0:200", 0, inputs=())
    else:
        # With the same memory inputs, since the same encoder reads them.
        env = make_env(replace(_train_config(config), n_groups=1))
    kind = {spaces.Dict: "MultiInput", spaces.Box: "Cnn" if ours.policy.features_extractor.images else "Mlp"}
    return RecurrentPPO(
        f"{kind.get(type(env.observation_space), 'Mlp')}LstmPolicy",
        env,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        policy_kwargs=policy_kwargs(ours.policy),
        seed=0,
        device=config.device,
    )


def _updater(model: Any, backend: str = "auto") -> Callable[[], tuple[int, float, float]]:
    """Return what makes updates for a while, and tells the steps and the seconds of collecting and of learning."""
    _, callback = model._setup_learn(10**9)
    callback.on_training_start(locals(), globals())
    done = device_clock(model.device)

    def update() -> tuple[int, float, float]:
        before, collecting, learning = model.num_timesteps, 0.0, 0.0
        while model.num_timesteps == before or not long_enough(collecting + learning):
            start = done()
            with prefer(backend):
                model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=model.n_steps)
                middle = done()
                model.train()
            collecting, learning = collecting + middle - start, learning + done() - middle
        return model.num_timesteps - before, collecting, learning

    return update


def _memory(config: TrainBench, side: str) -> float:
    """Return the peak memory in MiB of a process that makes two updates: the GPU's tensors, or the whole process."""
    words = {k: v for k, v in _settings(config).items() if v is not None and k not in ("rounds",)}
    code = (
        "import json, sys; from srwm_rl.scripts.benchmarks.training import measure_memory; "
        "measure_memory(json.loads(sys.argv[1]), sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(words), side], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{side} could not be measured: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def measure_memory(settings: dict[str, Any], side: str) -> None:
    """Make two updates in this process and print its peak memory in MiB."""
    config = TrainBench(**settings)
    ours = _ours(config)
    model = ours if side == "srwm-rl" else _theirs(config, ours)
    update = _updater(model)
    update()
    update()
    if model.device.type == "cuda":
        print(torch.cuda.max_memory_allocated(model.device) / 2**20)
        return
    # Not getrusage: what it tells of a child counts the parent's memory at the moment of the fork.
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
