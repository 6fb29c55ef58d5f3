"""`srwm-rl bench op|env|encoder|train|suite`: ratios measured in one run, and no figure where results differ."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.scripts.benchmarks.options import Common
from srwm_rl.scripts.cli import parse

PROG = "srwm-rl bench"
KINDS = {
    "op": ("operators", "OperatorBench", "the recurrence, backend by backend, beside its arithmetic's bound"),
    "env": ("environments", "EnvBench", "ProcGen through our layers, beside ProcGen itself"),
    "encoder": ("encoder", "EncoderBench", "the CNN, by layout and precision"),
    "train": ("training", "TrainBench", "a trainer, beside its bound and sb3-contrib's"),
    "suite": ("suite", "SuiteBench", "what docs/results is made of, one after the other"),
}


def main(argv: list[str]) -> int:
    """Run a benchmark; return 1 if some results were wrong."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {PROG} KIND [options]\n\n" + "\n".join(f"  {k:<8} {what}" for k, (_, _, what) in KINDS.items()))
        return 0 if argv else 2
    module, config = read(argv)
    result = _measure(module, config) if isinstance(config, Common) else module.run(config)
    return int(result.get("wrong", False))


def read(words: list[str]) -> tuple[Any, Any]:
    """Return the module that does what the words after `bench` ask for, and its settings.

    Raises:
        UserError: no such kind, or options that cannot be read.
    """
    if words[0] not in KINDS:
        raise UserError(
            f"bench needs to know of what, not {words[0]!r}{did_you_mean(words[0], KINDS)}; see {PROG} --help"
        )
    module_name, config_name, _ = KINDS[words[0]]
    module = import_module(f"srwm_rl.scripts.benchmarks.{module_name}")
    return module, parse(getattr(module, config_name), words[1:], f"{PROG} {words[0]}")


def _measure(module: Any, config: Common) -> dict[str, Any]:
    """Run one benchmark, and write its results where they are wanted."""
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.json is not None and not config.json.resolve().parent.is_dir():
        raise UserError(f"--json: there is no folder {config.json.resolve().parent}")
    result: dict[str, Any] = module.run(config)
    if config.json is not None:
        config.json.write_text(json.dumps({"torch": torch.__version__, **result}, indent=1, default=str) + "\n")
    return result
