"""A checkpoint of the published RL code: the kind of agent, its weights, and what it was trained on.

The code is IDSIA/modern-srwm, reinforcement_learning (https://github.com/IDSIA/modern-srwm); its `model.tar` has the
weights under "model_state_dict", the options of its command line under "flags" and its progress under "stats".
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from srwm_rl.errors import UserError
from srwm_rl.official.torch_zip import TorchArchive

# The core that an option selects, in the order in which their learner checks; None: not in this package.
OPTIONS: dict[str, str | None] = {
    "use_delta": "delta",
    "use_lt": None,
    "use_delta_rnn": None,
    "use_rec_delta": None,
    "use_dd": None,
    "use_sr": "srwm",
    "use_psr": "fake_sr",
    "use_smfwp": "sr_delta",
    "use_no_carry_sr": "srwm_no_carry",
    "use_deep_ff": "feedforward",
    "use_lstm": "lstm",
}
# Training on N games at once takes the first N of these lists.
GAMES = (
    "bigfish", "fruitbot", "maze", "leaper", "plunder", "starpilot", "miner", "bossfight",
    "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "heist", "jumper", "ninja",
)  # fmt: skip
MEMORY_GAMES = ("dodgeball", "heist", "maze", "miner", "caveflyer", "jumper")
MODES = ("easy", "hard", "extreme", "memory", "exploration")
PAPER: dict[str, Any] = {"multi_env": 6, "distribution_mode": "easy", "start_level": 0, "num_levels": 200}
HELD_OUT_START, HELD_OUT_LEVELS = 1000, 200  # the first of the paper's three test sets
MAX_WEIGHTS = 2**26
MAX_STEPS = 10**12
MAX_LEVELS = 2**31 - 1
PLAIN = (str, int, float, type(None))
Flags = dict[str, Any]  # short values of these types


@dataclass(frozen=True)
class OfficialCheckpoint:
    """A checkpoint of the published RL code."""

    core: str  # its name in this package
    weights: dict[str, np.ndarray]  # float32, by the names in the file
    num_timesteps: int  # environment steps it was trained for, 0 if the file does not tell
    training: dict[str, Any]  # what it was trained on, as settings of `srwm-rl train`
    notes: tuple[str, ...]  # sentences on what was assumed because the file does not tell it


def read_checkpoint(path: Path) -> OfficialCheckpoint:
    """Read a checkpoint of the published RL code without running anything in it.

    Raises:
        UserError: no such file, or a file that is damaged, foreign or of an unknown agent.
    """
    archive = TorchArchive(path)
    content = archive.content
    described = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(described, dict) or not described:
        raise UserError(f"{path} has no model_state_dict: it is no checkpoint of the published RL code")
    flags, stats = _plain(content.get("flags")), _plain(content.get("stats"))
    weights = _read_weights(archive, described)
    notes: list[str] = []
    core, steps = _choose_core(path, weights, flags, notes), _steps(stats.get("step"))
    training = _read_training(path, flags, steps, notes)
    return OfficialCheckpoint(core, weights, steps, training, tuple(notes))


def _plain(entries: Any) -> Flags:
    """Return the entries whose value is a short text, a number or None: safe to print, and all that is used."""
    items = entries.items() if isinstance(entries, dict) else ()
    return {name: value for name, value in items if isinstance(value, PLAIN) and sys.getsizeof(value) < 300}


def _steps(number: Any) -> int:
    return number if type(number) is int and 0 <= number < MAX_STEPS else 0


def _read_weights(archive: TorchArchive, described: dict[Any, Any]) -> dict[str, np.ndarray]:
    weights: dict[str, np.ndarray] = {}
    total = 0
    for name, tensor in described.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name):
            raise UserError(f"{archive.path} is damaged: a weight has a name that cannot be")
        array = archive.array(tensor, name)
        total += array.size
        if total > MAX_WEIGHTS:
            raise UserError(f"{archive.path} has more than {MAX_WEIGHTS:,} weights; an agent has a few million")
        if array.dtype.kind != "f":
            raise UserError(f"{archive.path} is damaged: weight {name!r} is of type {array.dtype}")
        with np.errstate(over="ignore"):  # reported below
            weights[name] = array.astype(np.float32)
        if not np.isfinite(weights[name]).all():
            raise UserError(f"{archive.path} is broken: weight {name!r} is not finite; use another checkpoint")
    return weights


def _choose_core(path: Path, weights: dict[str, np.ndarray], flags: Flags, notes: list[str]) -> str:
    """Return the core's name; the weights' names and the options must agree."""
    by_weights = _core_by_weights(path, weights)
    if not flags.keys() & OPTIONS.keys():
        if by_weights == "srwm":
            notes.append(
                "it does not tell whether its SRWM carries over its edits from step to step; assumed that it does"
            )
        return by_weights
    option = next((option for option in OPTIONS if flags.get(option) is True), None)
    by_flags = OPTIONS[option] if option else "feedforward"
    if by_flags is None:
        known = ", ".join(option for option, core in OPTIONS.items() if core)
        raise UserError(f"{path} is an agent of --{option}, which srwm-rl does not have; it has those of {known}")
    if by_flags != by_weights and (by_flags, by_weights) != ("srwm_no_carry", "srwm"):
        chosen = f"--{option}" if option else "no core at all"
        raise UserError(f"{path} contradicts itself: its options say {chosen}, its weights are those of {by_weights}")
    return by_flags


def _core_by_weights(path: Path, weights: dict[str, np.ndarray]) -> str:
    layer = "core.fwm_layers.0"
    if "core.weight_ih_l0" in weights:
        return "lstm"
    if not any(name.startswith("core.") for name in weights):
        return "feedforward"
    if f"{layer}.slow_net.weight" in weights:
        return "delta"
    if f"{layer}.W_y" not in weights:
        raise UserError(f"{path} is no agent of the published RL code: it lacks weight {layer + '.W_y'!r}")
    if f"{layer}.W_q" not in weights:
        return "fake_sr"
    # The SR-Delta network's output is another network's key, query, value and rate: 3D + 1 columns instead of D.
    widths = {weights[f"{layer}.{name}"].shape[-1:] for name in ("W_y", "W_q")}
    return "srwm" if len(widths) == 1 else "sr_delta"


def _read_training(path: Path, flags: Flags, steps: int, notes: list[str]) -> dict[str, Any]:
    """Return what the agent was trained on, as settings of `srwm-rl train`."""
    if "multi_env" not in flags and "env" not in flags:
        notes.append("it does not name its games; assumed are the paper's six in easy mode, levels 0:200")
        flags = PAPER
    mode = flags.get("distribution_mode", "hard")
    if mode not in MODES:
        raise UserError(f"{path} is damaged: ProcGen has no distribution mode {mode!r}")
    start, count = flags.get("start_level", 0), flags.get("num_levels", 0)  # no level: all
    fits = type(start) is int and type(count) is int and min(start, count) >= 0
    if not fits or start + count > MAX_LEVELS - HELD_OUT_LEVELS:
        raise UserError(f"{path} is damaged: it cannot have been trained on {count!r} levels from {start!r} on")
    held_out = max(HELD_OUT_START, start + count if count else 0)
    games = _games(path, flags, mode)
    gamma, n_actors = flags.get("discounting"), flags.get("num_actors")
    actors_fit = type(n_actors) is int and 0 < n_actors <= 4096 and n_actors % len(games) == 0
    return {
        "env": ",".join(games),
        "mode": mode,
        "levels": f"{start}:{start + count}" if count else "all",
        "eval_levels": f"{held_out}:{held_out + HELD_OUT_LEVELS}",
        "n_timesteps": max(1, steps, _steps(flags.get("total_steps"))),
        "n_envs": n_actors if actors_fit else 8 * len(games),
        "gamma": gamma if isinstance(gamma, float) and 0 <= gamma <= 1 else 0.99,
    }


def _games(path: Path, flags: Flags, mode: str) -> tuple[str, ...]:
    n_games = flags.get("multi_env", 1)
    games = MEMORY_GAMES if mode == "memory" else GAMES
    if type(n_games) is int and 1 < n_games <= len(games):
        return games[:n_games]
    game = re.fullmatch(r"(?:procgen:)?procgen-(\w+)-v0", str(flags.get("env")))
    if n_games != 1 or game is None or game[1] not in GAMES:
        raise UserError(f"{path} was trained on {flags.get('env')!r}; only agents of ProcGen games can be imported")
    return (game[1],)
