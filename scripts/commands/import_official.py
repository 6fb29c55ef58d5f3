"""`srwm-rl import-official`: an agent trained by the paper's authors' code becomes a run folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import parse

if TYPE_CHECKING:
    from pathlib import Path

PROG = "srwm-rl import-official"
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
    """Make a run folder of a checkpoint of the paper's authors' RL code (IDSIA/modern-srwm, ProcGen).

    The file is read as data: nothing in it is run, so it need not be trusted. SRWM (with or without carry-over),
    SR-Delta, Fake SR, Delta Net, LSTM and feed-forward agents can be imported, and evaluated with srwm-rl eval.
    """

    checkpoint: tyro.conf.Positional[str]
    """Their checkpoint, such as model.tar."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="STR", help_behavior_hint="(required)")] = None
    """The run folder to make."""
    verbose: int = 1
    """0: errors only, 1: what was imported, 2: tracebacks too."""

    def __post_init__(self) -> None:
        if not self.output:
            raise UserError("say which run folder to make: -o RUN")


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(ImportConfig, argv, PROG)
    from srwm_rl.official.cores import import_checkpoint

    assert config.output is not None
    folder = import_checkpoint(config.checkpoint, config.output)
    if config.verbose:
        print(describe(folder))
    return 0


def describe(folder: Path) -> str:
    """Say in a few lines what the run folder holds and what to do with it."""
    from srwm_rl.scripts.config.settings import TrainConfig
    from srwm_rl.storage.model_file import load
    from srwm_rl.storage.run_folder import Run

    run = Run.open(folder)
    train, imported = TrainConfig.from_json(run.config["train"]), run.config["imported"]
    steps = load(folder).num_timesteps
    trained = f"trained for {steps:,} steps" if steps else "of unknown age"
    lines = [
        f"imported {NAMES[train.core]} ({imported['n_weights']:,} weights), {trained}",
        f"  games     {train.env}; mode {train.mode}",
        f"  levels    {train.levels} for training, {train.eval_levels} held out",
        *_notes(imported["notes"]),
        f"  folder    {folder}",
        f"Now: srwm-rl eval {shlex.quote(str(folder))} {_protocol(train.levels)}",
    ]
    return "\n".join(lines)


def _protocol(levels: str) -> str:
    from srwm_rl.envs.levels import LevelRange

    # The paper's protocol plays 0:200 as training levels and 1000:1600 as held-out ones; all of it takes the most
    # probable action.
    trained = LevelRange.parse(levels)
    return "--protocol paper" if trained.start == 0 and 200 <= trained.stop <= 1000 else "--deterministic"


def _notes(notes: list[Any]) -> list[str]:
    return [f"  note      {note}" for note in notes]
