"""Going on with a run: which settings may change, what a change leaves behind, and the proof that it is exact."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from srwm_rl.errors import UserError
from srwm_rl.scripts.config.foreign_settings import read_settings
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.checkpoints import FORMAT, capture, take_up
from srwm_rl.scripts.training.monitoring import make_best_model_tracker, make_callbacks
from srwm_rl.storage.run_folder import CONFIG, Run
from srwm_rl.storage.safe_file import pack, read_file

if TYPE_CHECKING:
    from srwm_rl.agents.base import RecurrentAlgorithm
    from srwm_rl.agents.run.metrics import MetricsFile

METRICS = "metrics.jsonl"
# What says how a command runs and nothing of what is learned.
FREE = {
    "n_timesteps", "resume", "override", "verify", "supervise", "hang_seconds", "dry_run", "env_list", "progress",
    "verbose", "save_freq", "n_threads", "log_folder", "on_nan", "preset", "eval_freq", "eval_episodes", "video_freq",
    "profile",
}  # fmt: skip
# What may be changed in the middle of a run by whoever says so: it is then no longer the run it was.
WITH_OVERRIDE = {
    "learning_rate", "lr_decay", "batch_size", "n_epochs", "bptt", "gamma", "gae_lambda", "clip_range", "ent_coef",
    "vf_coef", "max_grad_norm", "target_kl", "vtrace_lambda", "rho_clip", "c_clip", "synchronous", "eval_levels",
    "device",
}  # fmt: skip


def check_changes(stored: TrainConfig, wanted: TrainConfig) -> dict[str, list[Any]]:
    """Return what a resumed run changes beside its length and its output, `{name: [before, now]}`.

    Raises:
        UserError: a change that needs --override, or that would be another run.
    """
    changes = {}
    for field in fields(TrainConfig):
        before, now = getattr(stored, field.name), getattr(wanted, field.name)
        if before == now or field.name in FREE:
            continue
        flag = field.name.replace("_", "-")
        if field.name not in WITH_OVERRIDE:
            raise UserError(
                f"a resumed run keeps its settings: leave out --{flag} (the run has {before!r}), or start a new run"
            )
        if not wanted.override:
            raise UserError(
                f"the run has --{flag} {before!r}: leave it out, or insist with --override (the run's history keeps it)"
            )
        changes[field.name] = [before, now]
    return changes


def keep_settings(run: Run, config: TrainConfig, steps: int, changes: dict[str, list[Any]]) -> None:
    """Write a new length and changed settings into the run, so that --resume goes on to there with no other flag."""
    train = run.config["train"]
    if train.get("n_timesteps") == config.n_timesteps and not changes:
        return
    train["n_timesteps"] = config.n_timesteps
    for name, (_, now) in changes.items():
        train[name] = now
    if changes:
        run.config.setdefault("history", []).append({"at": steps, "changed": changes})
    run.write_config()


class _ReachedError(Exception):
    """The replay is where the newer checkpoint was taken."""


def verify(run: Run, config: TrainConfig, model: RecurrentAlgorithm) -> str:
    """Play the stretch between the run's two newest checkpoints again and compare bit by bit.

    Returns:
        What was shown, in a line.

    Raises:
        UserError: there are no two checkpoints, exactness cannot be had, or the replay differs.
    """
    older, newer = _two_checkpoints(run)
    if config.algo == "impala" and not config.synchronous:
        raise UserError(
            "learning overlaps playing in this run, so that no two runs are the same; --synchronous ones are"
        )
    from srwm_rl.agents.run.metrics import MetricsFile

    expected, meta = read_file(newer)
    if meta["state"].get("processes"):
        raise UserError("several processes trained this run, and --verify plays in one, which is not exact")
    goal = meta["state"]["counters"]["num_timesteps"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / METRICS
        log.write_bytes((run.path / METRICS).read_bytes())
        metrics = MetricsFile(log)
        try:
            state = _replay(config, model, older, metrics, goal)
        finally:
            metrics.close()
        found, tree = pack(state)
        replayed = _lines(log, read_file(older)[1]["state"]["metrics"], state["metrics"])
    written = _lines(run.path / METRICS, read_file(older)[1]["state"]["metrics"], meta["state"]["metrics"])
    differences = [*_differences(expected, found), *_tree_differences(meta["state"], json.loads(json.dumps(tree)))]
    differences += ["metrics.jsonl"] * (replayed != written)
    start = read_file(older)[1]["state"]["counters"]["num_timesteps"]
    if differences:
        raise UserError(
            f"{run.path} is not exact: from {start} to {goal} steps {len(differences)} part(s) differ, first "
            f"{differences[0]}; was it written by another version, on another machine or with other threads?"
        )
    return (
        f"exact: from {start:,} to {goal:,} steps, played again, all {len(expected)} arrays and {len(written)} lines "
        f"of the log are bit for bit what the run wrote"
    )


def _two_checkpoints(run: Run) -> tuple[Path, Path]:
    intact = []
    for path in run.files("checkpoint"):
        meta = read_file(path)[1]
        if meta.get("kind") == "checkpoint" and meta["format"] <= FORMAT:
            intact.append(path)
    if len(intact) < 2:
        raise UserError(
            f"{run.path} has {len(intact)} checkpoint(s); --verify plays from one to the next and needs two"
        )
    return intact[-2], intact[-1]


def _replay(
    config: TrainConfig, model: RecurrentAlgorithm, start: Path, metrics: MetricsFile, goal: int
) -> dict[str, Any]:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger

    class Until(BaseCallback):
        state: dict[str, Any] | None = None

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if self.num_timesteps >= goal:
                self.state = capture(model, metrics, best_model)
                raise _ReachedError

    model.set_logger(Logger(None, [metrics]))
    best_model = make_best_model_tracker(config)
    exact, pending = take_up(model, start, *read_file(start), metrics, best_model)
    if not exact:
        raise UserError(f"{type(model.env).__name__} cannot tell its state, so that no resumed run is exact")
    for name, (value, exclude) in pending.items():
        model.logger.record(name, float("nan") if value is None else value, tuple(exclude))
    until = Until()
    try:
        callbacks = [until, *make_callbacks(config, model, best_model, lambda: None)]
        model.learn(config.n_timesteps - model.num_timesteps, callbacks, reset_num_timesteps=False)
    except _ReachedError:
        assert until.state is not None
        return until.state
    return capture(model, metrics, best_model)


def _lines(log: Path, start: int, stop: int) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_bytes()[start:stop].splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def _differences(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> list[str]:
    odd = sorted(expected.keys() ^ found.keys())
    same = expected.keys() & found.keys()
    return odd + [name for name in sorted(same) if not np.array_equal(expected[name], found[name], equal_nan=True)]


def _tree_differences(expected: Any, found: Any) -> list[str]:
    # The clock goes on: episodes carry their time, and the log's position depends on how times are printed.
    timed = ("metrics", "log")
    return [
        name
        for name in expected
        if name not in timed and list(_timeless(expected[name])) != list(_timeless(found.get(name)))
    ]


def _timeless(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key in sorted(node):
            if key != "t":
                yield from _timeless(node[key], f"{path}/{key}")
    elif isinstance(node, list):
        for i, each in enumerate(node):
            yield from _timeless(each, f"{path}/{i}")
    else:
        yield path, node


def stored_config(run: Run, path: str) -> TrainConfig:
    """Return the settings with which a run goes on."""
    return replace(read_settings(run.config["train"], str(run.path / CONFIG)), resume=path, profile=False)
