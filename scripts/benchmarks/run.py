"""Run one benchmark from its command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch

from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.scripts.benchmarks import encoder, environments, operators, suite, trainers, training
from srwm_rl.scripts.cli import check_writable, parse, write_json
from srwm_rl.scripts.training.build import use_deterministic_cudnn

BENCHMARKS: dict[str, tuple[Callable[[Any], dict[str, Any]], type[Any]]] = {
    "op": (operators.run, operators.OperatorBench),
    "env": (environments.run, environments.EnvBench),
    "encoder": (encoder.run, encoder.EncoderBench),
    "train": (training.run, trainers.TrainBench),
    "suite": (suite.run, suite.SuiteBench),
}


def run_benchmark(argv: list[str], prog: str) -> int:
    """Run the benchmark that `argv` names; return 1 if some results were wrong.

    Raises:
        UserError: no such benchmark, options that cannot be parsed, or results that cannot be written.
    """
    config = read(argv, prog)
    file = getattr(config, "json", None)  # the suite has its own files
    check_writable(file, "--json")
    if getattr(config, "threads", None) is not None:
        torch.set_num_threads(config.threads)
    use_deterministic_cudnn()  # as in training
    result = BENCHMARKS[argv[0]][0](config)
    write_json(file, msgspec.to_builtins({"torch": str(torch.__version__), **result}))
    return int(result.get("wrong", False))


def read(argv: list[str], prog: str) -> Any:
    """Return the options of the benchmark that `argv` names.

    Raises:
        UserError: no such benchmark, or options that cannot be parsed.
    """
    name = argv[0]
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark {name!r}{did_you_mean(name, BENCHMARKS)}; see {prog} --help")
    return parse(BENCHMARKS[name][1], argv[1:], f"{prog} {name}")
