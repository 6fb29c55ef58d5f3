"""A report on runs: read or evaluate them, and render the page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from srwm_rl.envs.procgen import published
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.foreign_settings import allow_env, read_settings
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.evaluation.protocol import EvalConfig
from srwm_rl.scripts.evaluation.results import Evaluation, read_evaluation
from srwm_rl.scripts.evaluation.runner import evaluate
from srwm_rl.scripts.reports.charts import Charts
from srwm_rl.scripts.reports.render import read_video, render_page
from srwm_rl.scripts.reports.sections import Section, SeedRun, settings_key, summary_line
from srwm_rl.storage.run_folder import CONFIG, Run, model_files, run_folder


def make_report(
    configs: Sequence[EvalConfig], eval_files: Sequence[str], freeze: bool, video: str | None, command: str
) -> str:
    """Return a page on runs, which are evaluated unless `eval_files` has the results of `srwm-rl eval --json` of each.

    Raises:
        UserError: a run or a file cannot be read, or a file belongs to another run; nothing has been played then.
    """
    runs = [Run.open(run_folder(config.run)) for config in configs]
    trained = [_settings(run, config.env) for run, config in zip(runs, configs, strict=True)]
    evaluations = _read_evaluations(configs, trained, eval_files)
    video_url = None if video is None else read_video(video)
    if not evaluations:
        for config in configs:
            model_files(config.run)
        evaluations = [evaluate(config, freeze) for config in configs]
    groups: dict[tuple[Any, ...], list[SeedRun]] = {}
    for run, settings, evaluation, config in zip(runs, trained, evaluations, configs, strict=True):
        seed_run = SeedRun(run, settings, evaluation, config.seed, config.run)
        groups.setdefault(settings_key(settings), []).append(seed_run)
    charts = Charts()
    sections = [
        Section(group, charts, configs[0].seed, command, None if i else video_url)
        for i, group in enumerate(groups.values())
    ]
    return render_page(
        "report.html",
        title=sections[0].title if len(sections) == 1 else "Runs",
        subtitle=summary_line(sections),
        written=time.strftime("%Y-%m-%d", time.gmtime()),
        sections=sections,
        published=published,
    )


def _settings(run: Run, env: str | None) -> TrainConfig:
    source = str(run.path / CONFIG)
    trained = read_settings(run.config["train"], source)
    allow_env(trained.env, env, source)
    return trained


def _read_evaluations(
    configs: Sequence[EvalConfig], trained: list[TrainConfig], files: Sequence[str]
) -> list[Evaluation]:
    evaluations = [read_evaluation(file) for file in files]
    for file, config, settings, evaluation in zip(files, configs, trained, evaluations, strict=False):
        if (evaluation["env"], evaluation["core"]) != (settings.env, settings.core):
            raise UserError(
                f"{file} is of {evaluation['core']} on {evaluation['env']}, but {config.run} is {settings.core} on "
                f"{settings.env}; give the --eval files in the order of the runs"
            )
    return evaluations
