"""`srwm-rl bench op|env|encoder|train`: ratios measured in one run, and no figure where results differ."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.scripts.cli import parse

PROG = "srwm-rl bench"
KINDS = {
    "op": ("operators", "OperatorBench", "the recurrence, backend by backend, beside its arithmetic's bound"),
    "env": ("environments", "EnvBench", "ProcGen through our layers, beside ProcGen itself"),
    "encoder": ("encoder", "EncoderBench", "the CNN, by layout and precision"),
    "train": ("training", "TrainBench", "a trainer, beside its bound and sb3-contrib's"),
}


def main(argv: list[str]) -> int:
    """Run a benchmark; return 1 if some results were wrong."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {PROG} KIND [options]\n\n" + "\n".join(f"  {k:<8} {what}" for k, (_, _, what) in KINDS.items()))
        return 0 if argv else 2
    if argv[0] not in KINDS:
        raise UserError(
            f"bench needs to know of what, not {argv[0]!r}{did_you_mean(argv[0], KINDS)}; see {PROG} --help"
        )
    module_name, config_name, _ = KINDS[argv[0]]
    module = import_module(f"srwm_rl.scripts.benchmarks.{module_name}")
    config: Any = parse(getattr(module, config_name), argv[1:], f"{PROG} {argv[0]}")
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.json is not None and not config.json.resolve().parent.is_dir():
        raise UserError(f"--json: there is no folder {config.json.resolve().parent}")
    result: dict[str, Any] = module.run(config)
    if config.json is not None:
        config.json.write_text(json.dumps({"torch": torch.__version__, **result}, indent=1, default=str) + "\n")
    return int(result.get("wrong", False))
