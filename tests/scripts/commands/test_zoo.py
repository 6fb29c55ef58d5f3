"""`srwm-rl zoo`, `watch --demo`, and zoo:NAME in the other commands."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srwm_rl.envs.tasks.room_picture import _AGENT, _GOAL
from srwm_rl.zoo import zoo_names


def test_all_agents_are_listed_with_their_scores(call: Any) -> None:
    result = call("zoo")
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == zoo_names()
    assert all("[" in line for line in lines[2:])


def test_a_card_has_the_scores_and_the_commands(call: Any) -> None:
    result = call("zoo", "hidden_controls")
    assert result.code == 0
    for part in (
        *("random play", "best constant action", "edits frozen", "knows the controls", "return by attempt"),
        "trained by    srwm-rl train --env hidden_controls --n-timesteps 600000 --seed 0\n",
        "evaluated by  srwm-rl eval zoo:hidden_controls --train-levels none --baselines --freeze-edits\n",
    ):
        assert part in result.out, part
    assert call("zoo", "zoo:hidden_controls").out == result.out


def test_wrong_names_are_one_line(call: Any, tmp_path: Path) -> None:
    assert "did you mean 'recall'" in call("zoo", "rekall").error()
    assert "did you mean 'recall'" in call("eval", "zoo:recal").error()
    assert "did you mean 'bandit'" in call("watch", "--demo", "bandits").error()
    assert "watch --demo" in call("watch").error()


@pytest.mark.parametrize("argv", [("report", "zoo:recall"), ("train", "--resume", "zoo:recall")])
def test_commands_that_need_a_run_folder_say_so(call: Any, argv: tuple[str, ...]) -> None:
    assert "zoo:recall is a bundled agent, which has no run folder; srwm-rl zoo recall" in call(*argv).error()


def test_an_agent_of_the_zoo_is_filmed(call: Any, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    result = call("watch", "--demo", "recall", "-o", film, "--no-progress")
    assert result.code == 0, result
    assert film.stat().st_size > 10_000
    assert "recall, held-out level 1000000" in result.out


def test_the_demos_film_shows_the_room(call: Any, tmp_path: Path) -> None:
    film = tmp_path / "film.gif"
    result = call("watch", "--demo", "--steps", 3, "-o", film, "--no-progress")
    assert result.code == 0, result
    with Image.open(film) as picture:
        room = np.asarray(picture.convert("RGB"))[92:604, 24:536].astype(int)
    for colour in (_AGENT, _GOAL):
        assert (np.abs(room - colour).max(-1) < 12).sum() > 500, "a GIF's colours are rounded"


def test_two_agents_of_the_zoo_are_compared(call: Any) -> None:
    names = ("zoo:hidden_controls", "zoo:hidden_controls_feedforward")
    result = call("compare", *names, "--eval-levels", "2000000:2000050", "--no-progress")
    assert result.code == 0, result
    assert "A: srwm, 603,648 steps, zoo:hidden_controls\n" in result.out
