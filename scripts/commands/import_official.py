"""`srwm-rl import-official`: convert an agent trained by the paper's authors' code to a run folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from srwm_rl.envs.levels import LevelRange
from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import parse
from srwm_rl.storage.run_folder import Run, steps_of

NAMES = {
    "srwm": "SRWM",
    "srwm_no_carry": "SRWM without carry-over",
    "sr_delta": "SR-Delta",
    "fake_sr": "Fake SR",
    "delta": "Delta Net",
    "lstm": "LSTM",
    "feedforward": "feed-forward",
}


@dataclass(frozen=True)
class ImportConfig:
    """Convert a checkpoint of the paper's authors' RL code (IDSIA/modern-srwm, ProcGen) to a run folder.

    The file is read as data: nothing in it is run, so it need not be trusted. SRWM (with or without carry-over),
    SR-Delta, Fake SR, Delta Net, LSTM and feed-forward agents can be imported, and evaluated with srwm-rl eval.
    """

    checkpoint: tyro.conf.Positional[str]
    """Their checkpoint, such as model.tar."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="STR", help_behavior_hint="(required)")] = None
    """The run folder to make."""
    verbose: int = 1
    """0: errors only, 1: a summary too, 2: tracebacks too."""

    def __post_init__(self) -> None:
        if not self.output:
            raise UserError("name the run folder to make: -o RUN")


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(ImportConfig, argv, "srwm-rl import-official")
    from srwm_rl.official import import_checkpoint

    assert config.output is not None
    folder = import_checkpoint(config.checkpoint, config.output)
    if config.verbose:
        print(describe(folder))
    return 0


def describe(folder: Path) -> str:
    """Return a summary of an imported run folder and the command that evaluates it."""
    run = Run.open(folder)
    train, imported = run.config["train"], run.config["imported"]
    steps = steps_of(run.models()[0])
    trained = f"trained for {steps:,} steps" if steps else "of unknown age"
    levels = LevelRange.parse(train["levels"])
    # The paper's protocol evaluates levels 0:200 as training levels and 1000:1600 as held-out ones.
    protocol = "--protocol paper" if levels.start == 0 and 200 <= levels.stop <= 1000 else "--deterministic"
    lines = [
        f"imported {NAMES[train['core']]} ({imported['n_weights']:,} weights), {trained}",
        f"  games     {train['env']}; mode {train['mode']}",
        f"  levels    {train['levels']} for training, {train['eval_levels']} held out",
        *(f"  note      {note}" for note in imported["notes"]),
        f"  folder    {folder}",
        f"Now: srwm-rl eval {shlex.quote(str(folder))} {protocol}",
    ]
    return "\n".join(lines)
