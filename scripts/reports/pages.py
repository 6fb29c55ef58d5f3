"""Report pages: read or evaluate runs, compare them, and fill the templates; text from a run is escaped."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import srwm_rl
from srwm_rl.agents.evaluation.head_costs import HeadCosts
from srwm_rl.envs.procgen import published
from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_small
from srwm_rl.scripts.config.foreign_settings import allow_env, read_settings
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.evaluation.head_costs import head_costs
from srwm_rl.scripts.evaluation.paired import ComparedRuns
from srwm_rl.scripts.evaluation.protocol import EvalConfig, chosen_note, explain
from srwm_rl.scripts.evaluation.results import Evaluation, read_evaluation
from srwm_rl.scripts.evaluation.runner import evaluate
from srwm_rl.scripts.evaluation.table import side_notes, warnings_of
from srwm_rl.scripts.reports.charts import Charts, short_number
from srwm_rl.scripts.reports.sections import FREE, Section, SeedRun, difference_maps, settings_key
from srwm_rl.storage.run_folder import CONFIG, Run, model_files, run_folder

BASELINES_DEPEND_ON = (
    *("env", "mode", "env_kwargs", "levels", "eval_levels", "attempts", "shuffle_actions", "wrapper", "atari"),
)
MAX_VIDEO_BYTES = 32 * 2**20


def make_report(
    configs: Sequence[EvalConfig],
    eval_files: Sequence[str],
    freeze: bool,
    video: str | None,
    command: str,
    rank_heads: bool = True,
) -> str:
    """Return a page on runs, which are evaluated unless `eval_files` has the results of `srwm-rl eval --json` of each.

    `rank_heads`: show what lesioning each head costs; with `eval_files` only where it is stored in the run.

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
        evaluations = _evaluate_all(configs, trained, freeze)
    heads = [_head_costs(config, play=not eval_files) if rank_heads else None for config in configs]
    groups: dict[tuple[Any, ...], list[SeedRun]] = {}
    for run, settings, evaluation, config, costs in zip(runs, trained, evaluations, configs, heads, strict=True):
        drawn_with = None if eval_files else config.seed
        seed_run = SeedRun(run, settings, evaluation, config.seed, drawn_with, config.run, costs)
        groups.setdefault(settings_key(settings), []).append(seed_run)
    charts, seed = Charts(), configs[0].seed
    sections = [Section(group, charts, seed, command) for group in groups.values()]
    return render_page("report.html", sections=sections, video=video_url, published=published)


def _evaluate_all(configs: Sequence[EvalConfig], trained: Sequence[TrainConfig], freeze: bool) -> list[Evaluation]:
    """Evaluate runs; the baselines of those with the same environment and levels are played once."""
    evaluations, baselines = [], dict[tuple[Any, ...], list[Any]]()
    for config, settings in zip(configs, trained, strict=True):
        key = tuple(getattr(settings, name) for name in BASELINES_DEPEND_ON)
        evaluation = evaluate(replace(config, baselines=config.baselines and key not in baselines), freeze)
        if config.baselines:
            evaluation["baselines"] = baselines.setdefault(key, evaluation.get("baselines", []))
        evaluations.append(evaluation)
    return evaluations


def _head_costs(config: EvalConfig, play: bool) -> HeadCosts | None:
    try:
        return head_costs(config, play)
    except UserError:  # without playing, a run needs no model that can be loaded
        if play:
            raise
        return None


def _settings(run: Run, env: str | None) -> TrainConfig:
    source = str(run.path / CONFIG)
    trained = read_settings(run.config["train"], source)
    allow_env(trained.env, env, source)
    return trained


def _read_evaluations(
    configs: Sequence[EvalConfig], trained: list[TrainConfig], files: Sequence[str]
) -> list[Evaluation]:
    evaluations = [read_evaluation(file, settings) for file, settings in zip(files, trained, strict=False)]
    for file, config, settings, evaluation in zip(files, configs, trained, evaluations, strict=False):
        if (evaluation["env"], evaluation["core"]) != (settings.env, settings.core):
            raise UserError(
                f"{file} is of {evaluation['core']} on {evaluation['env']}, but {config.run} is {settings.core} on "
                f"{settings.env}; give the --eval files in the order of the runs"
            )
    return evaluations


def read_video(path: str) -> str:
    """Return an MP4 file as a data URL.

    Raises:
        UserError: it cannot be read, is no MP4, or is too large to be part of a page.
    """
    file = Path(path)
    if file.is_file() and (size := file.stat().st_size) > MAX_VIDEO_BYTES:
        raise UserError(f"{path} has {size / 2**20:.0f} MB; a page takes videos up to 32 MB, record a shorter one")
    content = read_small(file, MAX_VIDEO_BYTES)
    if content[4:8] != b"ftyp":
        raise UserError(f"{path} is no MP4 video; give --video a file that is")
    return f"data:video/mp4;base64,{base64.b64encode(content).decode()}"


def comparison_page(sides: Sequence[ComparedRuns], report: dict[str, Any], command: str) -> str:
    """Return a comparison of A and B as a page; `report` is from `paired.compare`."""
    charts, seeds = Charts(), report["seeds"]
    improvement = profiles = None
    if len(report["rows"]) > 1:
        improvements = {row["game"]: row["improvement"] for row in report["rows"]}
        improvement = charts.intervals(improvements, "probability that A does better on a level", 0.5)
    if seeds is not None:
        named = {f"{side}: {report[side]['core']}": seeds[side]["profile"] for side in "AB"}
        profiles = charts.profiles(seeds["thresholds"], named, f"{seeds['unit']} on held-out levels")
    differences: dict[str, dict[int, float]] = {}
    for game, level, a, b in report["returns"]:
        differences.setdefault(game, {})[level] = a - b
    first, second = (side.trained[0].to_json() for side in sides)
    settings = [(name, first[name], second[name]) for name in first if name not in FREE]
    return render_page(
        "compare.html",
        report=report,
        command=command,
        improvement=improvement,
        profiles=profiles,
        maps=difference_maps(differences),
        differences=[(name, a, b) for name, a, b in settings if a != b],
        warnings=warnings_of(report),
        baseline_notes=side_notes(report["baselines"]),
    )


def render_page(template: str, **data: Any) -> str:
    """Fill one of the templates; text in `data` is escaped, `Markup` is not."""
    loader = PackageLoader("srwm_rl.scripts.reports", "templates")
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"short": short_number, "number": _number, "signed": _signed, "percent": "{:.1%}".format}
    env.filters |= {"explain": explain, "chosen_note": chosen_note}
    env.filters["plain"] = lambda value: value if isinstance(value, str) else json.dumps(value)
    written = time.strftime("%Y-%m-%d", time.gmtime())
    return env.get_template(template).render(version=srwm_rl.__version__, written=written, **data)


def _number(value: float | None, digits: int = 2) -> str:
    return "?" if value is None else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _signed(value: float | None, digits: int = 2) -> str:
    return _number(value, digits) if value is None or value < 0 else f"+{_number(value, digits)}"
