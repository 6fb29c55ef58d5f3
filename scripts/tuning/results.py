"""A search's results: the best settings as a file for `srwm-rl train --config`, and a page on all trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from srwm_rl.scripts.cli import write_output
from srwm_rl.scripts.config.config_file import dump_yaml
from srwm_rl.scripts.reports.charts import Charts
from srwm_rl.scripts.reports.pages import render_page
from srwm_rl.scripts.tuning.record import BEST_SETTINGS, PAGE
from srwm_rl.scripts.tuning.search import Search, describe_end, describe_values

MIN_TRIALS = 4  # with a score, for estimates of importance


def write_results(folder: Path, search: Search, command: str) -> None:
    """Write the best settings, once a trial has a score, and the page on the trials."""
    trials = search.study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if complete:
        best, wanted = search.study.best_trial, search.settings
        comment = [
            f"{describe_end(best)} on levels {wanted.levels}, seeds {wanted.seeds} (report others)",
            f"best of {len(trials)} trials of: {command}",
        ]
        text = "".join(f"# {line}\n" for line in comment) + dump_yaml(search.settings_of(best.params))
        write_output(folder / BEST_SETTINGS, text.encode())
    write_output(folder / PAGE, _page(search, trials, complete, command).encode())


def _page(search: Search, trials: list[FrozenTrial], complete: list[FrozenTrial], command: str) -> str:
    charts, best = Charts(), None
    history = importance = None
    if complete:
        best = search.study.best_trial
        history = charts.history({trial.number: float(trial.value or 0.0) for trial in complete}, "mean return")
    if len(complete) >= MIN_TRIALS and (shares := _importances(search.study)):
        importance = charts.bars(shares, "share of the variance of scores")
    order = sorted(trials, key=lambda trial: (-_score(trial), trial.number))
    return render_page(
        "tune.html",
        settings=search.settings,
        best=best,
        best_yaml=dump_yaml(search.settings_of(best.params)) if best else "",
        history=history,
        importance=importance,
        rows=[(trial.number, describe_end(trial), describe_values(trial)) for trial in order],
        command=command,
    )


def _score(trial: FrozenTrial) -> float:
    return float(trial.value) if trial.state == TrialState.COMPLETE and trial.value is not None else -np.inf


def _importances(study: optuna.Study) -> dict[str, Any]:
    """Return each setting's share in the variance of scores by PED-ANOVA (Watanabe et al., 2023); {} if unknown."""
    try:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError):  # all scores are equal, or trials have no setting in common
        return {}
