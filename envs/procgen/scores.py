"""Published score ranges of the ProcGen games."""

from __future__ import annotations

# game: (easy mode, hard mode)
_RANGES = {
    "bigfish": ((1.0, 40.0), (0.0, 40.0)),
    "bossfight": ((0.5, 13.0), (0.5, 13.0)),
    "caveflyer": ((3.5, 12.0), (2.0, 13.4)),
    "chaser": ((0.5, 13.0), (0.5, 14.2)),
    "climber": ((2.0, 12.6), (1.0, 12.6)),
    "coinrun": ((5.0, 10.0), (5.0, 10.0)),
    "dodgeball": ((1.5, 19.0), (1.5, 19.0)),
    "fruitbot": ((-1.5, 32.4), (-0.5, 27.2)),
    "heist": ((3.5, 10.0), (2.0, 10.0)),
    "jumper": ((1.0, 10.0), (1.0, 10.0)),
    "leaper": ((1.5, 10.0), (1.5, 10.0)),
    "maze": ((5.0, 10.0), (4.0, 10.0)),
    "miner": ((1.5, 13.0), (1.5, 20.0)),
    "ninja": ((3.5, 10.0), (2.0, 10.0)),
    "plunder": ((4.5, 30.0), (3.0, 30.0)),
    "starpilot": ((2.5, 64.0), (1.5, 35.0)),
}
PROCGEN_NORMALIZATION: dict[str, dict[str, tuple[float, float]]] = {
    mode: {game: ranges[i] for game, ranges in _RANGES.items()} for i, mode in enumerate(("easy", "hard"))
}
"""`mode -> game -> (return without skill, highest return)`, published for two modes only.

Source: https://github.com/openai/train-procgen/blob/master/train_procgen/constants.py
"""
