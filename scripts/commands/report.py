"""`srwm-rl report`: one page on runs, a file that needs nothing else."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import check_device, check_writable, parse, write_output
from srwm_rl.scripts.evaluation.protocol import PlayOptions, with_own_draws
from srwm_rl.storage.run_group import expand_groups

PLAYING = (
    "eval_levels",
    "train_levels",
    "allow_overlap",
    "repeats",
    "deterministic",
    "core",
    "n_envs",
    "undo",
    "lesion",
    "beside",
)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(PlayOptions):
    """Write one HTML page on runs: training, returns per game and level, settings. It opens anywhere, offline."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, or groups of runs; RUN/best is the best model of a run, RUN its newest. Runs that differ only in
    their seed share a section."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "report.html"
    """The page."""
    eval: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Results of srwm-rl eval --json: one file per run, in the runs' order; then nothing is played."""
    video: str | None = None
    """An MP4 of the first run's agent, to include in the page."""
    train_levels: str | None = None
    """Training levels to play, as in srwm-rl eval."""
    beside: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Play the held-out levels with another agent too, as in srwm-rl eval."""
    random: bool = True
    """Play the held-out levels with random actions too, for comparison; without it the other baselines are left out."""
    baselines: bool = True
    """Play them also with the best constant action, and show the task's reference policies, as in srwm-rl eval. For a
    ProcGen game it takes up to a minute."""
    freeze: bool = True
    """Play once more with the network's edits of itself frozen, if it makes any, as in srwm-rl eval."""
    undo: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Play once more with the edits of these columns undone, as in srwm-rl eval."""
    lesion: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Play once more with the edits of one head left out, as in srwm-rl eval."""
    rank_heads: bool = True
    """Rank the heads by what lesioning each costs on held-out levels, and store it in the run folder. With --eval it is
    shown if it is stored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise UserError("name a run folder: srwm-rl report RUN")
        if self.eval and len(self.eval) != (n_runs := len(expand_groups(self.runs))):
            raise UserError(f"{len(self.eval)} --eval files for {n_runs} runs: give one per run, in their order")
        for name in PLAYING if self.eval else ():
            if getattr(self, name) != getattr(ReportConfig, name):
                raise UserError(f"with --eval nothing is played: leave out --{name.replace('_', '-')}")


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(ReportConfig, argv, "srwm-rl report")
    config = replace(config, runs=expand_groups(config.runs))
    check_writable(Path(config.output), "-o")
    check_device(config.device)
    from srwm_rl.scripts.reports.pages import make_report

    options = {name: getattr(config, name) for name in ("train_levels", "random", "undo", "lesion", "beside")}
    playing = replace(config, baselines=config.baselines and config.random)
    configs = with_own_draws(playing.eval_config(run, **options) for run in config.runs)
    command = shlex.join(["srwm-rl", "report", *argv])
    page = make_report(configs, config.eval, config.freeze, config.video, command, config.rank_heads)
    write_output(config.output, page.encode())
    if config.verbose:
        print(f"{config.output}: {len(page.encode()) / 1000:,.0f} kB")
    return 0
