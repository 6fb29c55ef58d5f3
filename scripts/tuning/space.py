"""What a search may vary, by trainer and core, and how a trial's values become settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from srwm_rl.errors import UserError, did_you_mean, named
from srwm_rl.regular_file import read_small
from srwm_rl.scripts.config.config_file import NAMES, parse_yaml
from srwm_rl.scripts.config.settings import KWARGS, TrainConfig, pairs

MAX_BYTES = 2**18
MINIBATCHES = "n_minibatches"  # a batch_size of n_envs * n_steps / n_minibatches
Value = float | int | str | bool


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `log`: evenly by ratio; whole ones if both ends are."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError(f"low {self.low} must be below high {self.high}")
        if self.log and self.low <= 0:
            raise UserError(f"with log, low must be above 0, not {self.low}")


Choices = tuple[Value, ...]
Space = dict[str, Range | Choices]
"""Names of settings, `core_kwargs.hidden_size` for one within another, and the values that they may take."""

# Ranges around those of rl-zoo3's samplers for PPO, and of what was found to matter for this package's tasks.
_BY_REWARD: Space = {
    "learning_rate": Range(3e-4, 2e-2, log=True),
    "gamma": (0.9, 0.95, 0.98, 0.99, 0.995),
    "ent_coef": Range(1e-4, 0.1, log=True),
    "max_grad_norm": (0.5, 1.0, 5.0),
    "normalize_reward": (True, False),
}
TRAINERS: dict[str, Space] = {
    "ppo": {
        **_BY_REWARD,
        "gae_lambda": (0.3, 0.6, 0.8, 0.9, 0.95, 0.98),
        "n_steps": (32, 64, 128, 256),
        MINIBATCHES: (1, 2, 4, 8),
        "n_epochs": (2, 3, 5, 10),
        "clip_range": (0.1, 0.2, 0.3),
    },
    "impala": {**_BY_REWARD, "vtrace_lambda": (0.6, 0.8, 0.9, 1.0), "n_steps": (16, 32, 64), MINIBATCHES: (1, 2, 4)},
    "supervised": {
        "learning_rate": Range(5e-4, 3e-2, log=True),
        "max_grad_norm": (0.5, 1.0, 5.0),
        "warmup_updates": (0, 100),
    },
}
_SIZE: Space = {"core_kwargs.hidden_size": (32, 64, 128)}
_EDITS: Space = {
    **_SIZE,
    "core_kwargs.n_heads": (2, 4, 8),
    "core_kwargs.key_init": (1, 2),
    "core_kwargs.edit_lr_multiplier": (1, 3),
    "core_kwargs.short_conv": (0, 4),
}
CORES: dict[str, Space] = {
    "srwm": _EDITS,
    "srwm_no_carry": _EDITS,
    "sr_delta": _EDITS,
    "fake_sr": {**_SIZE, "core_kwargs.n_heads": (2, 4, 8)},
    "delta": {**_SIZE, "core_kwargs.n_heads": (2, 4, 8), "core_kwargs.short_conv": (0, 4)},
    "lstm": _SIZE,
    "gru": _SIZE,
    "feedforward": _SIZE,
}


def default_space(algo: str, core: str) -> Space:
    """Return what a search varies unless a file says otherwise; of a user's core, the trainer's settings alone."""
    return {**TRAINERS[algo], **CORES.get(core, {})}


def read_space(path: str) -> Space:
    """Return the space that a YAML file describes: `{low: 1e-4, high: 1e-2, log: true}`, or a list of values.

    Raises:
        UserError: the file cannot be read, or names an unknown setting or no values.
    """
    with named(path):
        return parse_space(parse_yaml(read_small(Path(path), MAX_BYTES)))


def parse_space(content: Any) -> Space:
    """Return the space that a file's content stands for.

    Raises:
        UserError: as `read_space`.
    """
    if not isinstance(content, dict) or not content:
        raise UserError("it has no settings to vary; write one per line, such as `n_steps: [32, 64]`")
    return {_name(str(name)): _values(str(name), value) for name, value in content.items()}


def space_to_mapping(space: Space) -> dict[str, Any]:
    """Return a space as the content of a file."""
    return {name: list(of) if isinstance(of, tuple) else asdict(of) for name, of in space.items()}


def _name(name: str) -> str:
    setting, _, part = name.replace("-", "_").partition(".")
    if (setting in KWARGS) != bool(part) or setting not in (*NAMES, MINIBATCHES):
        hint = did_you_mean(setting, [*NAMES, MINIBATCHES])
        raise UserError(f"unknown setting {name!r}{hint} (core_kwargs.hidden_size for a core's)")
    return f"{setting}.{part}" if part else setting


def _values(name: str, value: Any) -> Range | Choices:
    if isinstance(value, list) and value:
        choices = tuple(_scalar(item) for item in value)
        if len(set(map(repr, choices))) == len(choices) and all(isinstance(choice, Value) for choice in choices):
            return choices
        raise UserError(f"{name}: give different numbers, texts or true and false")
    if isinstance(value, dict) and {"low", "high"} <= value.keys() <= {field.name for field in fields(Range)}:
        numbers = {key: _scalar(item) for key, item in value.items()}
        if all(isinstance(numbers[key], int | float) for key in ("low", "high")):
            with named(name):
                return Range(**numbers)
    raise UserError(f"{name}: give a list of values, or {{low: ..., high: ..., log: true}}")


def _scalar(value: Any) -> Any:
    """Return a scalar of a file, whose texts are JSON where they can be read as such."""
    return pairs((f"x:{value}",), "space")["x"] if isinstance(value, str) and value else value


def to_settings(values: Mapping[str, Value], default: TrainConfig) -> dict[str, Any]:
    """Return a trial's values as settings of a file for `srwm-rl train --config`, beside the environment and core."""
    settings: dict[str, Any] = {}
    for name, value in values.items():
        setting, _, part = name.partition(".")
        if part:
            settings.setdefault(setting, {})[part] = value
        elif name != MINIBATCHES:
            settings[name] = value
    if MINIBATCHES in values:
        rollout = settings.get("n_envs", default.n_envs) * settings.get("n_steps", default.n_steps)
        settings["batch_size"] = rollout // int(values[MINIBATCHES])
    return settings


def default_values(space: Space, default: TrainConfig, of_core: Mapping[str, Any] | None = None) -> dict[str, Value]:
    """Return the values of a space that are nearest to the defaults; without texts and switches that lie outside of it.

    Args:
        space: what may vary.
        default: settings of a training.
        of_core: settings of its core that they do not name.
    """
    values: dict[str, Any] = {f"core_kwargs.{name}": value for name, value in (of_core or {}).items()}
    values[MINIBATCHES] = default.n_envs * default.n_steps / default.batch_size
    for name in NAMES:
        value = getattr(default, name)
        values |= {f"{name}.{part}": of for part, of in pairs(value, name).items()} if name in KWARGS else {name: value}
    nearest = {name: _nearest(values.get(name), allowed) for name, allowed in space.items()}
    return {name: value for name, value in nearest.items() if value is not None}


def _nearest(value: Any, allowed: Range | Choices) -> Value | None:
    if isinstance(allowed, tuple) and value in allowed:
        return allowed[allowed.index(value)]
    if not _is_number(value):
        return None
    if isinstance(allowed, Range):
        inside = min(max(value, allowed.low), allowed.high)
        return round(inside) if isinstance(allowed.low, int) and isinstance(allowed.high, int) else float(inside)
    return min((choice for choice in allowed if _is_number(choice)), key=lambda of: abs(of - value), default=None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
