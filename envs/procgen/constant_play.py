"""What the best constant action and random play earn on each ProcGen game in easy mode: a floor for any agent."""

from __future__ import annotations

from typing import NamedTuple


class ConstantPlay(NamedTuple):
    """Mean returns on the held-out levels 1000:1200, each played once."""

    action: int
    """The best of the nine movements and D on the training levels 0:100, held in every step."""
    constant: float
    standard_error: float
    """Of `constant`, over levels."""
    random: float


CONSTANT_PLAY = {
    "bigfish": ConstantPlay(5, 7.91, 0.75, 0.90),
    "bossfight": ConstantPlay(9, 1.21, 0.23, 0.01),
    "caveflyer": ConstantPlay(2, 1.00, 0.21, 2.67),
    "chaser": ConstantPlay(0, 0.29, 0.01, 0.62),
    "climber": ConstantPlay(8, 0.76, 0.18, 2.19),
    "coinrun": ConstantPlay(8, 6.90, 0.33, 2.70),
    "dodgeball": ConstantPlay(9, 0.89, 0.11, 0.53),
    "fruitbot": ConstantPlay(2, -1.11, 0.18, -2.79),
    "heist": ConstantPlay(2, 0.25, 0.11, 3.00),
    "jumper": ConstantPlay(8, 0.95, 0.21, 2.90),
    "leaper": ConstantPlay(5, 3.35, 0.33, 2.65),
    "maze": ConstantPlay(8, 1.00, 0.21, 3.45),
    "miner": ConstantPlay(5, 0.21, 0.07, 1.40),
    "ninja": ConstantPlay(8, 1.00, 0.21, 2.00),
    "plunder": ConstantPlay(9, 1.74, 0.11, 4.59),
    "starpilot": ConstantPlay(9, 1.28, 0.14, 1.36),
}
"""By game, easy mode. On bigfish and coinrun a constant action earns more than many trained agents do."""
