"""`srwm-rl plot RUN... -o curves.png`: learning curves of runs, over their seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import check_writable, parse
from srwm_rl.storage.run_group import expand_groups

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw a logged value of runs over training: a line per setting, over its seeds, in a panel per environment."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, or groups of runs. Runs that differ only in their seed are one line, named by the settings in which
    the lines differ."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "curves.png"
    """The picture; its name ends in .png, .svg or .pdf."""
    y: str | None = None
    """The logged value, as in metrics.jsonl: rollout/ep_rew_mean, rollout/accuracy, eval_test/mean_reward,
    train/value_loss. None: the first of these that all runs have."""
    x: Literal["steps", "hours"] = "steps"
    """Environment steps, or hours of training."""
    statistic: Literal["mean", "median", "iqm"] = "mean"
    """Over seeds: the mean, the median, or the mean of the middle half (interquartile mean, Agarwal et al. 2021)."""
    labels: tuple[str, ...] = ()
    """Names of the lines, in the order of the runs."""
    published: bool = False
    """Also draw PPO's published learning curves of ProcGen's games in easy mode: on training levels, or with a value of
    eval_test on the full distribution of levels."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("name one run folder or more")
        if Path(self.output).suffix.lower() not in FORMATS:
            raise UserError(f"-o {self.output}: the picture's name must end in {', '.join(FORMATS)}")
        if self.published and self.x != "steps":
            raise UserError("--published: the published curves are over steps; leave out --x hours")


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(PlotConfig, argv, "srwm-rl plot")
    check_writable(config.output, "-o")
    runs = expand_groups(config.runs)
    from srwm_rl.scripts.reports.plot import plot_runs

    plot_runs(runs, Path(config.output), config.y, config.x, config.statistic, config.labels, config.published)
    print(f"wrote {config.output}")
    return 0
