"""`srwm-rl share`: an agent as one file with its card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import check_writable, parse
from srwm_rl.scripts.evaluation.protocol import PlayOptions


@dataclass(frozen=True, kw_only=True)
class ShareConfig(PlayOptions):
    """Write an agent as one file that holds all that is needed to use it, with a card.

    The file is safetensors and JSON: loading it executes nothing. The card has the command that trains the agent, and
    its scores on held-out levels beside random play, the best constant action, the task's reference policies and the
    agent with its edits frozen, which are played now. srwm_rl.load(FILE), eval, watch, compare and export take it, also
    as an address https://...#sha256=HEX; srwm-rl zoo FILE prints the card.
    """

    run: tyro.conf.Positional[str]
    """A run folder, or a model file; RUN/best is the best model of a run, RUN its newest; zoo:NAME one that comes with
    the package."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "agent.safetensors"
    """The file."""
    force: bool = False
    """Replace the file if it exists."""
    note: str = ""
    """A line for the card."""
    baselines: bool = True
    """Play the held-out levels also with random actions and the best constant action, as in srwm-rl eval."""
    freeze: bool = True
    """Play once more with the network's edits of itself frozen, if it makes any."""


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(ShareConfig, argv, "srwm-rl share")
    path = Path(config.output)
    check_writable(path, "-o")
    if path.exists() and not config.force:
        raise UserError(f"{path} exists already; give another name with -o, or --force to replace it")
    from srwm_rl.scripts.evaluation.card import render_card
    from srwm_rl.scripts.evaluation.share import share

    agent = share(config.eval_config(config.run, train_levels="none"), config.freeze, path, config.note)
    if config.verbose:
        print(render_card(config.output, agent))
    return 0
