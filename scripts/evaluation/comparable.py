"""Whether agents were trained on one environment, so that their returns on the same levels can be compared."""

from __future__ import annotations

from inspect import signature
from typing import Any

from srwm_rl.envs.make import resolve
from srwm_rl.envs.tasks import TASKS
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import TrainConfig, pairs


def check_comparable(trained: dict[str, TrainConfig], named_levels: bool) -> None:
    """Refuse runs of different environments or, unless levels are named, with different held-out levels."""
    (first_run, first), *others = trained.items()
    for run, other in others:
        a, b = _environment(first), _environment(other)
        for what in a:
            if a[what] != b[what]:
                raise UserError(
                    f"only agents of one environment can be compared, but {first_run} and {run} differ in {what}: "
                    f"{a[what] or 'none'} and {b[what] or 'none'}"
                )
        if not named_levels and first.eval_levels != other.eval_levels:
            raise UserError(
                f"{first_run} holds out levels {first.eval_levels}, {run} {other.eval_levels}; "
                "name levels that neither was trained on with --eval-levels"
            )


def _environment(trained: TrainConfig) -> dict[str, Any]:
    spec = resolve(trained.env)
    settings = pairs(trained.env_kwargs, "env_kwargs")
    if spec.kind == "task":
        parameters = signature(TASKS[spec.names[0]]).parameters.values()
        settings = {of.name: of.default for of in parameters if of.name not in ("n_envs", "levels", "seed")} | settings
    return {
        "environment": ",".join(sorted(spec.names)),
        "mode": trained.mode,
        "settings of the environment": [f"{name}:{value}" for name, value in sorted(settings.items())],
        "attempts": trained.attempts,
        "shuffled actions": trained.shuffle_actions,
        "wrappers": [*["--atari"] * trained.atari, *map(" ".join, trained.wrapper)],
    }
