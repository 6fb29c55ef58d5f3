"""Published ProcGen scores, to stand beside ours: easy mode, 200 training levels, one agent per game."""

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

PROCGEN_EASY: tuple[Published, ...] = (
    Published(
        "PPO",
        1_000_000,
        CURVES,
        _FROM_CURVES,
        {"bigfish": 1.4, "fruitbot": 2.3, "maze": 5.2, "leaper": 3.0, "plunder": 3.9, "starpilot": 5.3},
    ),
    Published(
        "PPO",
        25_000_000,
        CURVES,
        _FROM_CURVES,
        {"bigfish": 4.8, "fruitbot": 26.3, "maze": 5.6, "leaper": 5.9, "plunder": 4.6, "starpilot": 23.8},
    ),
    Published(
        "PPO",
        25_000_000,
        CLOP,
        _FROM_TABLE,
        {
            "bigfish": 4.3,
            "bossfight": 9.1,
            "caveflyer": 5.5,
            "chaser": 6.9,
            "climber": 6.3,
            "coinrun": 9.0,
            "dodgeball": 3.3,
            "fruitbot": 28.5,
            "heist": 2.7,
            "jumper": 5.4,
            "leaper": 6.5,
            "maze": 5.1,
            "miner": 8.4,
            "ninja": 6.5,
            "plunder": 6.1,
            "starpilot": 36.1,
        },
    ),
    Published(
        "IDAAC",
        25_000_000,
        CLOP,
        _FROM_TABLE,
        {
            "bigfish": 18.5,
            "bossfight": 9.8,
            "caveflyer": 5.0,
            "chaser": 6.8,
            "climber": 8.3,
            "coinrun": 9.4,
            "dodgeball": 3.2,
            "fruitbot": 27.9,
            "heist": 3.5,
            "jumper": 6.3,
            "leaper": 7.7,
            "maze": 5.6,
            "miner": 9.5,
            "ninja": 6.8,
            "plunder": 23.3,
            "starpilot": 37.0,
        },
    ),
)

SRWM_PAPER = "https://arxiv.org/abs/2202.05780"
SRWM_PAPER_READ_AT = "https://www.alphaxiv.org/overview/2202.05780v2"
SRWM_PAPER_SCORE = 0.200
"""SRWM's normalised score on held-out levels, mean over the games of `paper6`: read in a summary, not in the paper."""
SRWM_PAPER_STEPS = 300_000_000
SRWM_PAPER_GAMES = ("bigfish", "fruitbot", "leaper", "maze", "plunder", "starpilot")
"""https://github.com/IDSIA/modern-srwm, reinforcement_learning/README.md."""
