"""A search for settings: trials, each a group of runs over seeds, scored on levels of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from srwm_rl.agents.evaluation.statistics import t_interval
from srwm_rl.errors import UserError
from srwm_rl.nn.cores import core_defaults
from srwm_rl.regular_file import read_end
from srwm_rl.scripts.config.config_file import dump_yaml
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.config.tuned import NONE
from srwm_rl.scripts.evaluation.protocol import EvalConfig
from srwm_rl.scripts.evaluation.runner import evaluate
from srwm_rl.scripts.reports.curves import read_curves
from srwm_rl.scripts.seeds.summary import steps_of_run
from srwm_rl.scripts.signals import catch_signals
from srwm_rl.scripts.tuning.record import SearchSettings
from srwm_rl.scripts.tuning.space import Choices, Range, Space, Value, default_values, to_settings
from srwm_rl.storage.run_folder import METRICS
from srwm_rl.storage.run_group import RunGroup

try:
    import fcntl
except ImportError:  # Windows: a search there is continued by one process at a time
    fcntl = None  # type: ignore[assignment]

POLL = 0.5  # seconds between looks at a trial's runs
MAX_LOG_BYTES = 2**16  # of which the last line is read
RUNGS = 8  # comparisons with other trials while a run trains
RETURNS = ("rollout/ep_rew_mean", "rollout/accuracy")  # what a run is compared by, the first that is logged
STARTUP_TRIALS = 10  # at random, before the sampler models which values are good
PRUNED_AFTER = 5  # trials that are never stopped early
GRACE = 60.0  # seconds in which a stopped training saves its runs
FOLDER = "folder"  # attribute of a trial: its folder on this machine
SETTINGS = "srwm-rl"  # attribute of a study: what it searches
MAX_REFUSED = 3  # trials in a row whose settings are refused, after which the search gives up


def score(rows: list[dict[str, Any]]) -> float:
    """Return what a trial is compared by, of an evaluation's rows: the mean return.

    Of several games it is the mean over games of normalised returns, where the range of each game's returns is known.
    """
    together, *by_game = rows
    normalized = together["normalized"] if by_game else None
    return float(together["return"]["mean"] if normalized is None else normalized)


class Stopped(Exception):
    """A signal asked the search to stop."""


class Search:
    """Trials in a folder of their own, and an optuna study that remembers what they scored.

    FOLDER/trials/trial_0003/settings.yml   for `srwm-rl train --config`
    FOLDER/trials/trial_0003/...            its group of runs

    Args:
        folder: of this process's trials.
        study: shared by all processes of the search.
        settings: what to search.
        space: what to vary.
        default: settings that a training has unless a trial varies them.
        jobs: runs of a trial that train at the same time; None: as many as there are cores.
    """

    def __init__(
        self,
        folder: Path,
        study: optuna.Study,
        settings: SearchSettings,
        space: Space,
        default: TrainConfig,
        jobs: int | None = None,
    ) -> None:
        self.folder, self.study, self.settings, self.space = folder, study, settings, space
        self.default, self.jobs = default, jobs
        stored = study.user_attrs.get(SETTINGS)
        if stored is None:
            study.set_user_attr(SETTINGS, asdict(settings))
            study.enqueue_trial(default_values(space, default, _of_core(settings.core, default)), skip_if_exists=True)
        elif stored != json.loads(json.dumps(asdict(settings))):
            changed = [name for name, value in asdict(settings).items() if stored.get(name) != value]
            raise UserError(f"the study {study.study_name} searches with other {', '.join(changed)}; choose a new one")

    def run(self, n_trials: int) -> None:
        """Run trials until the study has so many that ended; first those that were interrupted here.

        Raises:
            UserError: the settings of the first trials are refused.
            Stopped: by a signal; the trial is continued by the next call.
        """
        refused = 0
        with catch_signals() as signals:
            while (trial := self._next(n_trials)) is not None:
                path = Path(trial.user_attrs[FOLDER])
                path.mkdir(parents=True, exist_ok=True)
                with _lock(path) as lock:
                    if lock is not None:
                        reason = self._train_and_score(path, trial, lock, signals)
                        refused = refused + 1 if reason else 0
                        if refused >= MAX_REFUSED:
                            raise UserError(f"the settings of {refused} trials in a row were refused: {reason}")

    def _next(self, n_trials: int) -> Trial | None:
        """Return an interrupted trial of this folder, or a new one while there are to be more."""
        trials = self.study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state == TrialState.RUNNING and self._is_interrupted(trial):
                return Trial(self.study, trial._trial_id)
        if sum(trial.state not in (TrialState.WAITING,) for trial in trials) >= n_trials:
            return None
        # A generator of its own for every trial, so that a continued search draws what it would have drawn.
        self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=len(trials))
        new = self.study.ask()
        new.set_user_attr(FOLDER, str((self.folder / "trials" / f"trial_{new.number:04d}").resolve()))
        return new

    def _is_interrupted(self, trial: FrozenTrial) -> bool:
        """Return whether a running trial is of this folder and no process trains it."""
        path = Path(trial.user_attrs.get(FOLDER, ""))
        if path.parent != (self.folder / "trials").resolve() or not path.is_dir():
            return False
        with _lock(path) as lock:
            return lock is not None

    def _train_and_score(self, path: Path, trial: Trial, lock: TextIO, signals: list[int]) -> str:
        """Train a trial's runs, score and tell the study; return why its settings were refused, or ""."""
        values = {name: _suggest(trial, name, allowed) for name, allowed in self.space.items()}
        self._write_settings(path, trial.number, values)
        code, error = self._train(path, trial, lock, signals)
        if signals:
            raise Stopped(signal.Signals(signals[0]).name)
        if code is None:
            self.study.tell(trial, state=TrialState.PRUNED)
        elif code != 0:
            trial.set_user_attr("error", error)
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            scores = [self._score(run) for run in _group(path).run_paths()]  # type: ignore[union-attr]
            trial.set_user_attr("scores", scores)
            self.study.tell(trial, float(np.mean(scores)))
        _say(self.study, trial.number)
        return error if code == 2 else ""

    def _write_settings(self, path: Path, number: int, values: dict[str, Value]) -> None:
        text = f"# trial {number}\n{dump_yaml(self.settings_of(values))}"
        (path / "settings.yml").write_text(text, encoding="utf-8")

    def _train(self, path: Path, trial: Trial, lock: TextIO, signals: list[int]) -> tuple[int | None, str]:
        """Train a trial's runs; return the exit code, None if it was stopped early, and the last line printed."""
        group, config = _group(path), self.settings
        if group is None:
            arguments = ["--config", str(path / "settings.yml"), "--seeds", config.seeds, "--log-folder", str(path)]
        elif all(steps >= wanted > 0 for steps, wanted in map(steps_of_run, map(group.run_path, group.record.seeds))):
            return 0, ""
        else:
            arguments = ["--resume", str(group.path)]
        own = [("--env", config.env), ("--core", config.core)]
        arguments += [word for option, name in own if ":" in name for word in (option, name)]
        arguments += ["--jobs", str(self.jobs)] if self.jobs else []
        with (path / "train.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "srwm_rl", "train", *arguments, "--no-progress"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C reaches this process alone
                pass_fds=[lock.fileno()],  # the trial stays locked while it trains, if this process is killed, too
            )
            reported = {*self.study.get_trials(deepcopy=False)[trial.number].intermediate_values}
            try:
                while process.poll() is None and not signals:
                    time.sleep(POLL)
                    if config.prune and self._is_hopeless(path, trial, reported):
                        return None, ""
            finally:
                _end(process)
        lines = read_end(path / "train.log", MAX_LOG_BYTES).decode(errors="replace").splitlines()
        errors = [line.removeprefix("srwm-rl: ").removeprefix("error: ") for line in lines if line.strip()]
        return process.returncode, errors[-1][:300] if errors else ""

    def _is_hopeless(self, path: Path, trial: Trial, reported: set[int]) -> bool:
        """Report how the trial's runs do; return whether one is worse than half of other trials were at its step."""
        group = _group(path)
        for index, seed in enumerate(() if group is None else group.record.seeds):
            curves = read_curves(group.run_path(seed) / METRICS)  # type: ignore[union-attr]
            curve = next((curves[key] for key in RETURNS if key in curves), None)
            for part in range(1, RUNGS) if curve is not None else ():
                step, rung = part / RUNGS * self.settings.n_timesteps, index * RUNGS + part
                if rung in reported or curve.steps[-1] < step:  # type: ignore[union-attr]
                    continue
                values = np.interp(np.arange(1, part + 1) / RUNGS * self.settings.n_timesteps, *curve)  # type: ignore[misc]
                trial.report(float(values[-1]), rung)
                reported.add(rung)
                if self._is_below_median(float(values.max()), rung):
                    return True
        return False

    def _is_below_median(self, value: float, rung: int) -> bool:
        """Return whether a run's best value so far is below the median of other trials' values at its rung.

        Of trials that were trained to their end. optuna's `MedianPruner` would take the best value of all of a trial's
        runs: a second seed would hide behind the first.
        """
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        others = [trial.intermediate_values[rung] for trial in trials if rung in trial.intermediate_values]
        return len(others) >= PRUNED_AFTER and value < float(np.median(others))

    def _score(self, run: Path) -> float:
        """Return a run's score on the levels that score trials."""
        wanted = self.settings
        config = EvalConfig(
            run=str(run),
            env=wanted.env if ":" in wanted.env else None,
            core=wanted.core if ":" in wanted.core else None,
            train_levels="none",
            eval_levels=(wanted.levels,),
            progress=False,
            verbose=0,
        )
        return score(evaluate(config)["rows"])

    def settings_of(self, values: dict[str, Value]) -> dict[str, Any]:
        """Return a trial's settings as the content of a file for `srwm-rl train --config`."""
        wanted = self.settings
        settings = {"env": wanted.env, "core": wanted.core, "algo": wanted.algo, "n_timesteps": wanted.n_timesteps}
        settings |= {"preset": NONE}  # unless the settings in common name one
        return settings | _merged(wanted.fixed, to_settings(values, self.default))


def _merged(fixed: dict[str, Any], varied: dict[str, Any]) -> dict[str, Any]:
    """Return settings with others above them; those that are mappings are merged name by name."""
    return fixed | {
        name: {**fixed.get(name, {}), **value} if isinstance(value, dict) else value for name, value in varied.items()
    }


def open_study(storage: str, name: str) -> optuna.Study:
    """Open a study, or make it.

    Raises:
        UserError: the storage cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    except Exception as error:  # of optuna, SQLAlchemy or a database's driver
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--storage {storage} cannot be used: {reason}") from error


def describe_end(trial: FrozenTrial) -> str:
    """Return a trial's mean score over seeds with its 95% t-interval, or why it has none, as text."""
    if trial.state == TrialState.FAIL:
        return f"failed: {trial.user_attrs.get('error') or 'no reason is known'}"
    scores = np.array(trial.user_attrs.get("scores", ()), np.float64)
    if trial.state != TrialState.COMPLETE or not len(scores):
        return "stopped early" if trial.state == TrialState.PRUNED else "not finished"
    interval = t_interval(scores)
    return f"{interval.mean:.4g}" + (f" [{interval.low:.4g}, {interval.high:.4g}]" if len(scores) > 1 else "")


def describe_values(trial: FrozenTrial) -> str:
    """Return a trial's values of the settings that vary, as text."""
    return " ".join(f"{name.rpartition('.')[2]}:{_short(value)}" for name, value in trial.params.items())


def _say(study: optuna.Study, number: int) -> None:
    """Print how a trial ended."""
    trial = study.get_trials(deepcopy=False)[number]
    seconds = (trial.datetime_complete - trial.datetime_start).total_seconds()  # type: ignore[operator]
    is_best = trial.state == TrialState.COMPLETE and study.best_trial.number == number
    best = ", the best so far" if is_best else ""
    print(f"trial {number}: {describe_end(trial)}{best}  ({seconds:.0f} s; {describe_values(trial)})", flush=True)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _suggest(trial: Trial, name: str, allowed: Range | Choices) -> Value:
    if isinstance(allowed, tuple):
        return trial.suggest_categorical(name, list(allowed))  # type: ignore[return-value]  # None is no choice
    if isinstance(allowed.low, int) and isinstance(allowed.high, int):
        return trial.suggest_int(name, allowed.low, allowed.high, log=allowed.log)
    return trial.suggest_float(name, allowed.low, allowed.high, log=allowed.log)


def _group(path: Path) -> RunGroup | None:
    """Return a trial's group of runs, or None before it is made."""
    files = sorted(path.glob("*/*/group.json"))
    return RunGroup.open(files[0].parent) if files else None


@contextmanager
def _lock(path: Path) -> Iterator[TextIO | None]:
    """Lock a trial's folder and give the lock's file, or None where another process has it."""
    with (path / "lock").open("a") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a training, which saves its runs."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    if process.poll() is None:
        process.kill()
        process.wait()


def _of_core(core: str, default: TrainConfig) -> dict[str, Any]:
    """Return a core's own settings; none where its `variant` has others."""
    return {} if "variant" in pairs(default.core_kwargs, "core_kwargs") else core_defaults(core)
