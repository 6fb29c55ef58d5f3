"""Published scores: their means equal the aggregates that were published or computed from the same tables."""

import pytest

from srwm_rl.envs.procgen.games import GAMES
from srwm_rl.envs.procgen.published import (
    CLOP,
    CURVES,
    PROCGEN_EASY,
    PROCGEN_NORMALIZATION,
    SRWM_PAPER_GAMES,
    Published,
)


def normalized_mean(published: Published, games: tuple[str, ...]) -> float:
    bounds = PROCGEN_NORMALIZATION["easy"]
    scores = [(published.scores[game] - bounds[game][0]) / (bounds[game][1] - bounds[game][0]) for game in games]
    return sum(scores) / len(scores)


@pytest.mark.parametrize(
    ("method", "steps", "source", "games", "expected"),
    [
        ("PPO", 1_000_000, CURVES, SRWM_PAPER_GAMES, 0.059),
        ("PPO", 25_000_000, CURVES, SRWM_PAPER_GAMES, 0.317),
        ("PPO", 25_000_000, CLOP, SRWM_PAPER_GAMES, 0.364),
        ("PPO", 25_000_000, CLOP, tuple(GAMES), 0.397),
        ("IDAAC", 25_000_000, CLOP, SRWM_PAPER_GAMES, 0.577),
        ("IDAAC", 25_000_000, CLOP, tuple(GAMES), 0.516),
    ],
)
def test_normalized_means_of_the_scores_equal_the_published_aggregates(
    method: str, steps: int, source: str, games: tuple[str, ...], expected: float
) -> None:
    (row,) = (row for row in PROCGEN_EASY if (row.method, row.steps, row.source) == (method, steps, source))
    assert normalized_mean(row, games) == pytest.approx(expected, abs=1.2e-3)  # the scores are rounded


def test_every_published_score_names_a_known_game_and_a_source() -> None:
    for row in PROCGEN_EASY:
        assert set(row.scores) <= set(GAMES)
        assert row.source.startswith("https://")
        assert row.note
