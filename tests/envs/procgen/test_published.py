"""Published scores: the aggregates that were published, or computed from the same tables, come out of them."""

import pytest

from srwm_rl.envs.procgen.games import GAMES
from srwm_rl.envs.procgen.published import CLOP, CURVES, PROCGEN_EASY, SRWM_PAPER_GAMES, Published
from srwm_rl.envs.procgen.scores import PROCGEN_NORMALIZATION


def normalized(of: Published, games: tuple[str, ...]) -> float:
    bounds = PROCGEN_NORMALIZATION["easy"]
    each = [(of.scores[game] - bounds[game][0]) / (bounds[game][1] - bounds[game][0]) for game in games]
    return sum(each) / len(each)


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
def test_aggregates(method: str, steps: int, source: str, games: tuple[str, ...], expected: float) -> None:
    (found,) = (each for each in PROCGEN_EASY if (each.method, each.steps, each.source) == (method, steps, source))
    assert normalized(found, games) == pytest.approx(expected, abs=1.2e-3)  # the scores are rounded


def test_every_score_is_of_a_game_and_has_a_source() -> None:
    for each in PROCGEN_EASY:
        assert set(each.scores) <= set(GAMES)
        assert each.source.startswith("https://")
        assert each.note
