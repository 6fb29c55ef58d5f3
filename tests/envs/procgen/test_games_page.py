"""The page on ProcGen's games has the figures of the package."""

import re
from pathlib import Path

from srwm_rl.envs.procgen.constant_play import CONSTANT_PLAY
from srwm_rl.envs.procgen.games import ACTIONS, GAMES
from srwm_rl.envs.procgen.published import PROCGEN_EASY, PROCGEN_NORMALIZATION

DOCS = Path(__file__).parents[3] / "docs"


def test_the_table_has_the_figures_of_the_package() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", (DOCS / "procgen.md").read_text(), re.MULTILINE)
    assert [game for game, _ in rows] == list(GAMES)
    (ppo,) = (table for table in PROCGEN_EASY if table.method == "PPO" and "CLOP" in table.note)
    for game, row in rows:
        play = CONSTANT_PLAY[game]
        assert [cell.strip() for cell in row.split("|")] == [
            f"{play.action} ({ACTIONS[play.action]})",
            f"{play.constant:.2f} ({play.standard_error:.2f})",
            f"{play.random:.2f}",
            f"{ppo.scores[game]}",
            f"{PROCGEN_NORMALIZATION['easy'][game][1]:g}",
        ], game
