"""Settings of a resumed run: which may change, and where changes are recorded."""

from __future__ import annotations

import copy
import platform
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

from srwm_rl.envs.origin import versions
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.foreign_settings import read_settings
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.storage.run_folder import CONFIG, Run

# Settings of the command, which do not affect what is learned.
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
            raise UserError(
                f"a resumed run keeps its settings: leave out --{flag} (the run has {before!r}), or start a new run"
            )
        if not wanted.override:
            raise UserError(
                f"the run has --{flag} {before!r}: leave it out, or insist with --override (the run's history keeps it)"
            )
        changes[field.name] = [before, now]
    return changes


def installed_versions(env: str) -> dict[str, str]:
    """Return the versions of Python, of the packages that a run depends on, and of the one that `env` comes from."""
    packages = ("srwm-rl", "torch", "numpy", "gymnasium", "stable-baselines3", "sb3-contrib")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}, **versions(env)}


def keep_settings(run: Run, config: TrainConfig, steps: int, changes: dict[str, list[Any]]) -> None:
    """Write the new length and the changed settings to the run, so that --resume needs no other flag.

    Its history keeps the changes, and the versions from a step on where those differ from before.
    """
    before = copy.deepcopy(run.config)
    stored, here = run.config.pop("history", []), installed_versions(config.env)
    history = [entry for entry in stored if isinstance(entry, dict)] if isinstance(stored, list) else []
    run.config["train"] |= {"n_timesteps": config.n_timesteps, **{name: now for name, (_, now) in changes.items()}}
    if changes:
        history.append({"at": steps, "changed": changes})
    if [entry["versions"] for entry in (run.config, *history) if "versions" in entry][-1:] != [here]:
        history.append({"at": steps, "versions": here})
    if history:
        run.config["history"] = history
    if run.config != before:
        run.write_config()
