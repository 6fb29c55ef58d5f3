"""`srwm-rl bench train`: steps per second of a trainer, its upper bound, and another trainer in alternation."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.errors import UserError
from srwm_rl.scripts.benchmarks.check_backends import check_same
from srwm_rl.scripts.benchmarks.measure import format_ratio, ratio, summary
from srwm_rl.scripts.benchmarks.trainers import (
    TimedTraining,
    TrainBench,
    make_ours,
    make_sb3_contrib,
    peak_memory,
    settings_of,
    timed_training,
    train_config,
)
from srwm_rl.scripts.benchmarks.upper_bound import component_speeds, make_components, report_upper_bound
from srwm_rl.scripts.training.build import describe_threads, make_env, use_threads

OURS = "srwm-rl"


def run(config: TrainBench) -> dict[str, Any]:
    """Print the table and return it.

    Raises:
        UserError: a mode that the trainer lacks, or a trainer that cannot be compared.
    """
    if config.overlapping and config.algo != "impala":
        raise UserError("--overlapping is impala's; give --algo impala")
    ours = make_ours(config)
    _use_threads(config, ours, config.overlapping)
    trainers = _trainers(config, ours)
    n_epochs = config.n_epochs if config.algo == "ppo" else 1
    print(
        f"{config.env}, core {config.core}, {config.algo}{' overlapping' if config.overlapping else ''}, "
        f"{config.n_envs} x {config.n_steps} steps, {n_epochs} epoch(s), batch {config.batch_size}, "
        f"{ours.policy.features_extractor.describe()}; {ours.device}, {describe_threads()}"
    )
    rates, speeds = _measure(config, ours, trainers)
    rows = {
        name: {part: summary(values) for part, values in rates_of_parts.items()}
        for name, rates_of_parts in rates.items()
    }
    for name, row in rows.items():
        print(f"{name:<12} {'   '.join(f'{part} {speed}' for part, speed in row.items())} steps/s")
    result: dict[str, Any] = {
        "bench": "train",
        "settings": settings_of(config),
        "rows": {name: {part: speed._asdict() for part, speed in row.items()} for name, row in rows.items()},
    }
    concurrent = config.overlapping and ours.device.type == "cuda"
    result |= report_upper_bound(rates[OURS]["both"], speeds, n_epochs, concurrent)
    for name in trainers.keys() - {OURS}:
        ratios = {part: ratio(rates[OURS][part], values) for part, values in rates[name].items()}
        print(f"x {name:<10} {'   '.join(f'{part} {format_ratio(value)}' for part, value in ratios.items())}")
        result["ratio"] = {part: value._asdict() for part, value in ratios.items()}
    if config.against == "sb3-contrib":
        memory = result["peak_mib"] = {name: peak_memory(config, name) for name in trainers}
        print(f"peak memory  {', '.join(f'{name} {mib:,.0f} MiB' for name, mib in memory.items())}")
    return result


def _use_threads(config: TrainBench, ours: RecurrentAlgorithm, overlapping: bool) -> None:
    n_concurrent = config.n_envs if overlapping else 0
    use_threads(config.threads, ours.observation_space, n_concurrent, on_gpu=ours.device.type == "cuda")


def _trainers(config: TrainBench, ours: RecurrentAlgorithm) -> dict[str, TimedTraining]:
    """Return our trainer and the one that it is compared with, by name."""
    trainers = {OURS: timed_training(config, ours)}
    if config.against == "sb3-contrib":
        trainers["sb3-contrib"] = timed_training(config, make_sb3_contrib(config, ours))
    elif config.against == "feedforward":
        trainers["feedforward"] = timed_training(config, make_ours(replace(config, core="feedforward")))
    elif config.against == "reference":
        reference = make_ours(config)
        check_same(ours, reference)
        trainers["reference"] = timed_training(config, reference, "reference")
    elif config.against == "autograd":
        by_autograd = make_ours(config)
        by_autograd.native_gradient = lambda *_: None  # type: ignore[method-assign]
        trainers["autograd"] = timed_training(config, by_autograd)
    return trainers


def _measure(
    config: TrainBench, ours: RecurrentAlgorithm, trainers: dict[str, TimedTraining]
) -> tuple[dict[str, dict[str, list[float]]], list[dict[str, float]]]:
    """Return each trainer's steps per second, and those of the components alone, by round; the first is not timed."""
    rates: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in trainers}
    speeds: list[dict[str, float]] = []
    for number in range(config.rounds + 1):
        for name, train in trainers.items():
            for part, rate in train().items():
                if number:
                    rates[name][part].append(rate)
        if number == 0:
            components = make_components(ours, make_env(train_config(config)), config.batch_size)
            continue
        # In each round, since other load of the machine slows the components, too. Each of them uses all cores.
        _use_threads(config, ours, overlapping=False)
        speeds.append(component_speeds(components))
        _use_threads(config, ours, config.overlapping)
    return rates, speeds
