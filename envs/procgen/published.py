"""Published ProcGen scores: easy mode, 200 training levels, one agent per game."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Scores of one method at one budget.

    Attributes:
        method: its name.
        steps: environment steps per game.
        source: where the numbers stand.
        note: what the numbers are.
        scores: `game -> mean return on the full distribution of levels`.
    """

    method: str
    steps: int
    source: str
    note: str
    scores: dict[str, float]


CURVES = "https://github.com/openai/train-procgen/tree/master/train_procgen/results"
CLOP = "https://arxiv.org/abs/2204.06355"
_FROM_CURVES = "computed from the published learning curves: mean over 3 runs and the last 0.5M steps, sampled actions"
_FROM_TABLE = "as tabled in the CLOP paper (ICLR 2022), 25M steps"

# By game: PPO at 1M and at 25M steps from the curves; PPO and IDAAC at 25M steps from the table.
_SCORES: dict[str, tuple[float | None, float | None, float, float]] = {
    "bigfish": (1.4, 4.8, 4.3, 18.5),
    "bossfight": (None, None, 9.1, 9.8),
    "caveflyer": (None, None, 5.5, 5.0),
    "chaser": (None, None, 6.9, 6.8),
    "climber": (None, None, 6.3, 8.3),
    "coinrun": (None, None, 9.0, 9.4),
    "dodgeball": (None, None, 3.3, 3.2),
    "fruitbot": (2.3, 26.3, 28.5, 27.9),
    "heist": (None, None, 2.7, 3.5),
    "jumper": (None, None, 5.4, 6.3),
    "leaper": (3.0, 5.9, 6.5, 7.7),
    "maze": (5.2, 5.6, 5.1, 5.6),
    "miner": (None, None, 8.4, 9.5),
    "ninja": (None, None, 6.5, 6.8),
    "plunder": (3.9, 4.6, 6.1, 23.3),
    "starpilot": (5.3, 23.8, 36.1, 37.0),
}


def _column(i: int) -> dict[str, float]:
    return {game: score for game, row in _SCORES.items() if (score := row[i]) is not None}


PROCGEN_EASY: tuple[Published, ...] = (
    Published("PPO", 1_000_000, CURVES, _FROM_CURVES, _column(0)),
    Published("PPO", 25_000_000, CURVES, _FROM_CURVES, _column(1)),
    Published("PPO", 25_000_000, CLOP, _FROM_TABLE, _column(2)),
    Published("IDAAC", 25_000_000, CLOP, _FROM_TABLE, _column(3)),
)

SRWM_PAPER = "https://arxiv.org/abs/2202.05780"
SRWM_PAPER_READ_AT = "https://www.alphaxiv.org/overview/2202.05780v2"
SRWM_PAPER_SCORE = 0.200
"""SRWM's normalised score on held-out levels, mean over the games of `paper6`: read in a summary, not in the paper."""
SRWM_PAPER_STEPS = 300_000_000
SRWM_PAPER_GAMES = ("bigfish", "fruitbot", "leaper", "maze", "plunder", "starpilot")
"""https://github.com/IDSIA/modern-srwm, reinforcement_learning/README.md."""
