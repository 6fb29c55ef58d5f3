"""Published scores: their means equal the aggregates that were published or computed from the same tables."""

import pytest

from srwm_rl.envs.procgen.games import GAMES
from srwm_rl.envs.procgen.published import (
    CLOP,
    CURVES,
    PPO_CURVES,
    PROCGEN_EASY,
    PROCGEN_NORMALIZATION,
    SRWM_PAPER_GAMES,
)


def normalized_mean(scores: dict[str, float], games: tuple[str, ...]) -> float:
    bounds = PROCGEN_NORMALIZATION["easy"]
    return sum((scores[game] - bounds[game][0]) / (bounds[game][1] - bounds[game][0]) for game in games) / len(games)


@pytest.mark.parametrize(
    ("method", "steps", "source", "games", "expected"),
    [
        ("PPO", 1_000_000, CURVES, SRWM_PAPER_GAMES, 0.059),
        ("PPO", 2_000_000, CURVES, SRWM_PAPER_GAMES, 0.132),
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
    assert normalized_mean(row.scores, games) == pytest.approx(expected, abs=1.2e-3)  # the scores are rounded


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", (0.081, 0.160, 0.302, 0.376, 0.516, 0.562)), ("held_out", (0.059, 0.132, 0.197, 0.229, 0.317, 0.343))],
)
def test_the_curves_of_six_games_have_the_means_that_the_unrounded_ones_have(
    split: str, expected: tuple[float, ...]
) -> None:
    for i, mean in enumerate(expected):
        returns = {game: getattr(PPO_CURVES[game][i], split) for game in SRWM_PAPER_GAMES}
        # Each return is rounded by at most 0.05: 0.0036 in the mean of six games.
        assert normalized_mean(returns, SRWM_PAPER_GAMES) == pytest.approx(mean, abs=3.6e-3)
        assert len({PPO_CURVES[game][i].steps for game in SRWM_PAPER_GAMES}) == 1


def test_every_published_score_names_a_known_game_and_a_source() -> None:
    for row in PROCGEN_EASY:
        assert set(row.scores) <= set(GAMES)
        assert row.source.startswith("https://")
        assert row.note
