"""`srwm-rl report`: runs as one page that needs nothing but itself."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import check_device, check_writable, parse
from srwm_rl.scripts.config.foreign_settings import allow_env, read_settings
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.evaluation.protocol import PlayOptions
from srwm_rl.storage.run_folder import CONFIG, Run, model_files, run_folder

if TYPE_CHECKING:
    from srwm_rl.scripts.evaluation.results import Evaluation
    from srwm_rl.scripts.reports.sections import SeedRun

PROG = "srwm-rl report"


@dataclass(frozen=True, kw_only=True)
class ReportConfig(PlayOptions):
    """Write one HTML page on runs: training, returns per game and level, settings. It opens anywhere, offline."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders; RUN/best is the best model of a run, RUN its newest. Those that differ in their seed alone are taken
    together, the others have a section each."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "report.html"
    """The page."""
    eval: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What srwm-rl eval --json wrote: one file per run, in the runs' order; nothing is played then."""
    video: str | None = None
    """An MP4 of the first run's agent, to stand in the page."""
    train_levels: str | None = None
    """Training levels to play, as in srwm-rl eval."""
    random: bool = True
    """Play the held-out levels with random actions too, for comparison."""
    freeze: bool = True
    """Play once more with the network's edits of itself frozen, if it makes any, as in srwm-rl eval."""
    verbose: int = 1
    """0: errors only, 1: the page's name, 2: tracebacks too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise UserError("name a run folder: srwm-rl report RUN")
        for run in self.runs:
            if self.runs.count(run) > 1:
                raise UserError(f"{run} is given twice; give each run once")
        if not self.eval:
            return
        if len(self.eval) != len(self.runs):
            raise UserError(
                f"{len(self.eval)} --eval files for {len(self.runs)} runs: give one per run, in their order"
            )
        for name in PLAYED:
            if getattr(self, name) != getattr(ReportConfig, name):
                raise UserError(f"with --eval nothing is played: leave out --{name.replace('_', '-')}")


PLAYED = ("eval_levels", "train_levels", "allow_overlap", "repeats", "deterministic", "core", "n_envs")


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    config = parse(ReportConfig, argv, PROG)
    from srwm_rl.scripts.reports.charts import require_matplotlib
    from srwm_rl.scripts.reports.render import read_video

    require_matplotlib()
    check_writable(Path(config.output), "-o")
    check_device(config.device)
    runs = [Run.open(run_folder(each)) for each in config.runs]
    trained = [_settings(run, config.env) for run in runs]
    evaluations = _read_evaluations(config, trained)
    video = None if config.video is None else read_video(config.video)
    if not evaluations:
        for each in config.runs:  # all of them, before the first is played
            model_files(each)
    page = make_page(config, runs, trained, evaluations, video, shlex.join([*PROG.split(), *argv]))
    Path(config.output).write_text(page, encoding="utf-8")
    if config.verbose:
        print(f"{config.output}: {len(page.encode()) / 1000:,.0f} kB")
    return 0


def _settings(run: Run, env: str | None) -> TrainConfig:
    source = str(run.path / CONFIG)
    trained = read_settings(run.config["train"], source)
    allow_env(trained.env, env, source)
    return trained


def _read_evaluations(config: ReportConfig, trained: list[TrainConfig]) -> list[Evaluation]:
    from srwm_rl.scripts.evaluation.results import read_evaluation

    evaluations = [read_evaluation(each) for each in config.eval]
    for name, run, settings, each in zip(config.eval, config.runs, trained, evaluations, strict=False):
        if (each["env"], each["core"]) != (settings.env, settings.core):
            raise UserError(
                f"{name} is of {each['core']} on {each['env']}, but {run} is {settings.core} on {settings.env}; "
                "give the --eval files in the order of the runs"
            )
    return evaluations


def _evaluate(config: ReportConfig, run: str) -> Evaluation:
    from srwm_rl.scripts.evaluation.runner import evaluate

    options = {"train_levels": config.train_levels, "random": config.random}
    return evaluate(config.eval_config(run, **options), config.freeze)


def make_page(
    config: ReportConfig,
    runs: list[Run],
    trained: list[TrainConfig],
    evaluations: list[Evaluation],
    video: str | None,
    command: str,
) -> str:
    """Return the page's text; plays the runs unless there are evaluations."""
    from srwm_rl.envs.procgen import published
    from srwm_rl.scripts.reports.charts import Pictures
    from srwm_rl.scripts.reports.render import render_page
    from srwm_rl.scripts.reports.sections import Section, SeedRun, settings_key, summary_line

    groups: dict[tuple[Any, ...], list[SeedRun]] = {}
    for i, (run, settings) in enumerate(zip(runs, trained, strict=True)):
        evaluation = evaluations[i] if evaluations else _evaluate(config, config.runs[i])
        groups.setdefault(settings_key(settings), []).append(
            SeedRun(run, settings, evaluation, config.seed, config.runs[i])
        )
    pictures = Pictures()
    sections = [
        Section(group, pictures, config.seed, command, video if i == 0 else None)
        for i, group in enumerate(groups.values())
    ]
    paper = {
        "steps": published.SRWM_PAPER_STEPS,
        "score": published.SRWM_PAPER_SCORE,
        "source": published.SRWM_PAPER,
        "read_at": published.SRWM_PAPER_READ_AT,
    }
    return render_page(
        "report.html",
        title=sections[0].title if len(sections) == 1 else "Runs",
        subtitle=summary_line(sections),
        written=time.strftime("%Y-%m-%d", time.gmtime()),
        sections=sections,
        paper=paper,
    )
