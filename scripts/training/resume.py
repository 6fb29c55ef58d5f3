"""Settings of a resumed run: which may change, and where changes are recorded."""

from __future__ import annotations

import copy
import platform
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

import msgspec

from srwm_rl.envs.origin import versions
from srwm_rl.errors import UserError, named
from srwm_rl.scripts.config.foreign_settings import read_settings
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.storage.run_folder import CONFIG, Run
from srwm_rl.storage.strict_json import convert

# Settings of the command, which do not affect what is learned, but for the length, by which a learning rate decays.
FREE = {
    "n_timesteps", "resume", "override", "verify", "supervise", "hang_seconds", "dry_run", "env_list", "progress",
    "verbose", "save_freq", "n_threads", "log_folder", "on_nan", "preset", "eval_freq", "eval_episodes", "video_freq",
    "profile", "seeds", "jobs", "print_config", "track",
}  # fmt: skip
# Settings that --override may change: the run then differs from one that was never stopped.
WITH_OVERRIDE = {
    "learning_rate", "lr_decay", "batch_size", "n_epochs", "bptt", "gamma", "gae_lambda", "clip_range", "ent_coef",
    "vf_coef", "max_grad_norm", "target_kl", "vtrace_lambda", "rho_clip", "c_clip", "synchronous", "eval_levels",
    "device", "cnn_kernels",
}  # fmt: skip


class Change(msgspec.Struct, frozen=True):
    """An entry of a run's history: settings that were changed at a step, `{name: (before, now)}`."""

    at: int
    changed: dict[str, tuple[Any, Any]]


def changes_of(run: Run) -> list[Change]:
    """Return the changes of settings in a run's history, in their order.

    Raises:
        UserError: the history is damaged.
    """
    entries = [entry for entry in _history(run) if entry.get("changed")]
    with named(str(run.path / CONFIG)):
        return convert(entries, list[Change], "the run's history is damaged")


def _history(run: Run) -> list[dict[str, Any]]:
    history = run.config.get("history")
    return [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []


def stored_config(run: Run, path: str) -> TrainConfig:
    """Return the settings stored in a run folder; `path` is the value of --resume."""
    return replace(read_settings(run.config["train"], str(run.path / CONFIG)), resume=path, profile=False, config=None)


def check_changes(stored: TrainConfig, wanted: TrainConfig) -> dict[str, list[Any]]:
    """Return the changed settings of a resumed run, without those in `FREE`: `{name: [before, now]}`.

    Raises:
        UserError: a change that needs --override, or that is not possible.
    """
    changes = {}
    for field in fields(TrainConfig):
        before, now = getattr(stored, field.name), getattr(wanted, field.name)
        if before == now or field.name in FREE:
            continue
        flag = field.name.replace("_", "-")
        if field.name not in WITH_OVERRIDE:
            raise _keeps(flag, before)
        if not wanted.override:
            raise UserError(
                f"the run has --{flag} {before!r}: leave it out, or insist with --override (the run's history keeps it)"
            )
        changes[field.name] = [before, now]
    return changes


def check_algo(stored: TrainConfig, wanted: str | None) -> None:
    """Check the value of --algo, if it is given, before settings that only the run's own algorithm has are refused.

    Raises:
        UserError: it is not the run's.
    """
    if wanted not in (None, stored.algo):
        raise _keeps("algo", stored.algo)


def _keeps(flag: str, before: Any) -> UserError:
    return UserError(
        f"a resumed run keeps its settings: leave out --{flag} (the run has {before!r}), or start a new run"
    )


def installed_versions(env: str) -> dict[str, str]:
    """Return the versions of Python, of the packages that a run depends on, and of the one that `env` comes from."""
    packages = ("srwm-rl", "torch", "numpy", "gymnasium", "stable-baselines3", "sb3-contrib")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}, **versions(env)}


def changed_schedule(run: Run, config: TrainConfig, steps: int) -> str | None:
    """Return a line on the learning rate of a run of another length than before, if it decays; else None."""
    before, now = run.config["train"]["n_timesteps"], config.n_timesteps
    if before == now or config.lr_decay != "linear":
        return None
    old, new = (config.learning_rate * max(0, 1 - steps / length) for length in (before, now))
    return (
        f"the learning rate falls to 0 at {now:,} steps instead of {before:,}: from {steps:,} on it begins with "
        f"{new:.3g} instead of {old:.3g}; a new run of {now:,} steps is not the same"
    )


def keep_settings(run: Run, config: TrainConfig, steps: int, changes: dict[str, list[Any]]) -> None:
    """Write the new length and the changed settings to the run, so that --resume needs no other flag.

    Its history keeps both, and the versions from a step on where those differ from before.
    """
    length = run.config["train"]["n_timesteps"]
    if length != config.n_timesteps:
        changes = {"n_timesteps": [length, config.n_timesteps], **changes}
    before = copy.deepcopy(run.config)
    history, here = _history(run), installed_versions(config.env)
    run.config["train"] |= {name: now for name, (_, now) in changes.items()}
    if changes:
        history.append({"at": steps, "changed": changes})
    if [entry["versions"] for entry in (run.config, *history) if "versions" in entry][-1:] != [here]:
        history.append({"at": steps, "versions": here})
    if history:
        run.config["history"] = history
    if run.config != before:
        run.write_config()
