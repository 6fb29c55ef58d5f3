"""`srwm-rl zoo`: the agents that come with the package, and the cards of shared agents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from srwm_rl.scripts.cli import parse
from srwm_rl.storage.remote import is_address
from srwm_rl.zoo import PREFIX, zoo_names


@dataclass(frozen=True)
class ZooConfig:
    """List the agents that come with the package, or print the card of one.

    zoo:NAME stands for it in eval, watch, compare and export, and in srwm_rl.load.
    """

    name: tyro.conf.Positional[str | None] = None
    """One of them; or a file, or its address, that srwm-rl share wrote."""
    verbose: int = 1
    """2: tracebacks on errors."""


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(ZooConfig, argv, "srwm-rl zoo")
    from srwm_rl.scripts.evaluation.card import render_card, render_list
    from srwm_rl.storage.model_file import load

    if config.name is None:
        print(render_list({name: load(f"{PREFIX}{name}") for name in zoo_names()}))
        return 0
    is_other = is_address(config.name) or Path(config.name).is_file()
    name = config.name if is_other else f"{PREFIX}{config.name.removeprefix(PREFIX)}"
    print(render_card(name, load(name)))
    return 0
