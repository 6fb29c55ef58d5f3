"""Published ProcGen numbers: ranges of returns, and scores in easy mode (200 training levels, one agent per game)."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """Scores of one method at one budget, and where and what they are."""

    method: str
    steps: int  # per game
    source: str
    note: str
    scores: dict[str, float]  # game -> mean return on the full distribution of levels


CURVES = "https://github.com/openai/train-procgen/tree/master/train_procgen/results"
CLOP = "https://arxiv.org/abs/2204.06355"
_FROM_CURVES = "computed from the published learning curves: mean over 3 runs and the last 0.5M steps, sampled actions"
_FROM_TABLE = "as tabled in the CLOP paper (ICLR 2022), 25M steps"

# By game: the ranges of returns in easy and in hard mode; scores of PPO and of IDAAC at 25M steps from the table.
_Range = tuple[float, float]
_TABLE: dict[str, tuple[tuple[_Range, _Range], tuple[float, float]]] = {
    "bigfish": (((1.0, 40.0), (0.0, 40.0)), (4.3, 18.5)),
    "bossfight": (((0.5, 13.0), (0.5, 13.0)), (9.1, 9.8)),
    "caveflyer": (((3.5, 12.0), (2.0, 13.4)), (5.5, 5.0)),
    "chaser": (((0.5, 13.0), (0.5, 14.2)), (6.9, 6.8)),
    "climber": (((2.0, 12.6), (1.0, 12.6)), (6.3, 8.3)),
    "coinrun": (((5.0, 10.0), (5.0, 10.0)), (9.0, 9.4)),
    "dodgeball": (((1.5, 19.0), (1.5, 19.0)), (3.3, 3.2)),
    "fruitbot": (((-1.5, 32.4), (-0.5, 27.2)), (28.5, 27.9)),
    "heist": (((3.5, 10.0), (2.0, 10.0)), (2.7, 3.5)),
    "jumper": (((1.0, 10.0), (1.0, 10.0)), (5.4, 6.3)),
    "leaper": (((1.5, 10.0), (1.5, 10.0)), (6.5, 7.7)),
    "maze": (((5.0, 10.0), (4.0, 10.0)), (5.1, 5.6)),
    "miner": (((1.5, 13.0), (1.5, 20.0)), (8.4, 9.5)),
    "ninja": (((3.5, 10.0), (2.0, 10.0)), (6.5, 6.8)),
    "plunder": (((4.5, 30.0), (3.0, 30.0)), (6.1, 23.3)),
    "starpilot": (((2.5, 64.0), (1.5, 35.0)), (36.1, 37.0)),
}

PROCGEN_NORMALIZATION = {
    mode: {game: ranges[i] for game, (ranges, _) in _TABLE.items()} for i, mode in enumerate(("easy", "hard"))
}
"""`mode -> game -> (return without skill, highest return)`, published for two modes only.

Source: https://github.com/openai/train-procgen/blob/master/train_procgen/constants.py
"""

# Returns after `_STEPS` steps on 200 training levels, and on the full distribution of levels.
_STEPS = (1_000_000, 2_000_000, 5_000_000, 8_000_000, 25_000_000, 50_000_000)
_PPO_CURVES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "bigfish": ((1.7, 2.8, 5.2, 6.9, 11.9, 17.5), (1.4, 1.9, 2.7, 3.0, 4.8, 7.4)),
    "fruitbot": ((2.9, 15.3, 23.6, 26.0, 29.6, 30.4), (2.3, 13.9, 21.5, 23.4, 26.3, 26.7)),
    "leaper": ((3.4, 3.2, 3.8, 4.0, 6.2, 6.4), (3.0, 2.7, 3.3, 3.7, 5.9, 6.0)),
    "maze": ((5.4, 5.5, 7.0, 8.3, 9.3, 9.5), (5.2, 5.3, 5.1, 5.3, 5.6, 5.7)),
    "plunder": ((4.2, 4.5, 5.1, 5.4, 5.3, 4.5), (3.9, 4.4, 4.6, 4.8, 4.6, 4.2)),
    "starpilot": ((6.1, 10.3, 18.9, 21.0, 30.1, 36.0), (5.3, 9.3, 16.7, 18.3, 23.8, 27.5)),
}
_COINRUN_2M = (8.5, 7.8)


class CurvePoint(NamedTuple):
    """Mean returns of a published PPO agent after `steps` steps."""

    steps: int
    train: float  # on its 200 training levels
    held_out: float  # on the full distribution of levels


PPO_CURVES: dict[str, tuple[CurvePoint, ...]] = {
    **{game: tuple(map(CurvePoint, _STEPS, *returns)) for game, returns in _PPO_CURVES.items()},
    "coinrun": (CurvePoint(2_000_000, *_COINRUN_2M),),
}
"""`game -> points`: published learning curves of PPO in easy mode, one agent per game; of coinrun one point.

Source: `CURVES`; mean over 3 runs and the last 0.5M steps, sampled actions.
"""


def _on_curves(steps: int) -> dict[str, float]:
    return {game: point.held_out for game, curve in PPO_CURVES.items() for point in curve if point.steps == steps}


PROCGEN_EASY: tuple[Published, ...] = (
    *(Published("PPO", steps, CURVES, _FROM_CURVES, _on_curves(steps)) for steps in (1_000_000, 2_000_000, 25_000_000)),
    Published("PPO", 25_000_000, CLOP, _FROM_TABLE, {game: ppo for game, (_, (ppo, _)) in _TABLE.items()}),
    Published("IDAAC", 25_000_000, CLOP, _FROM_TABLE, {game: idaac for game, (_, (_, idaac)) in _TABLE.items()}),
)

SRWM_PAPER = "https://arxiv.org/abs/2202.05780"
SRWM_PAPER_READ_AT = "https://www.alphaxiv.org/overview/2202.05780v2"
SRWM_PAPER_SCORE = 0.200
"""SRWM's normalised score on held-out levels, mean over the games of `paper6`: read in a summary, not in the paper."""
SRWM_PAPER_STEPS = 300_000_000
SRWM_PAPER_GAMES = ("bigfish", "fruitbot", "leaper", "maze", "plunder", "starpilot")
"""https://github.com/IDSIA/modern-srwm, reinforcement_learning/README.md."""
