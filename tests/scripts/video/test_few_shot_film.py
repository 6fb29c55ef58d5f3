"""Films of few-shot episodes: what is asked, told and guessed, the examples so far, the running accuracy; replays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pytest

from srwm_rl.envs.tasks.fewshot import FewShotBatch
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import pairs
from srwm_rl.scripts.video.canvas import GREEN, ORANGE
from srwm_rl.scripts.video.few_shot_film import FPS, FewShotFilm, _example_steps
from srwm_rl.scripts.video.film import COLUMNS, GAME, HOLD, MARGIN
from srwm_rl.scripts.video.panel import running_accuracy
from srwm_rl.scripts.video.record import replay
from srwm_rl.scripts.video.trace import load_trace

LEVEL = 2_000_001


def watch(call: Any, run: Path, tmp_path: Path, *argv: object) -> Any:
    path = tmp_path / "film.npz"
    output = call("watch", run, "-o", tmp_path / "film.mp4", "--trace", path, "--no-progress", *argv)
    assert output.code == 0, output.err
    return load_trace(path)


@pytest.mark.parametrize("labels", ["ask", "sync", "delayed"])
def test_a_trace_has_what_was_asked_and_told(
    call: Any, train_few_shot: Callable[..., Path], tmp_path: Path, labels: str
) -> None:
    run = train_few_shot(labels=labels, queries=2, ways=3)
    trace = watch(call, run, tmp_path, "--level", LEVEL)
    arrays, env = trace.arrays, FewShotBatch(1, **pairs(trace.scene.env_kwargs, "env_kwargs"))
    steps = env.episodes(np.array([LEVEL]))
    n = int((steps.image >= 0).sum())
    assert len(arrays["answer"]) == n
    for name in ("label", "told", "seen", "query", "part"):
        assert np.array_equal(arrays[name], getattr(steps, name)[0, :n])
    assert np.array_equal(arrays["answer"], np.where(steps.asked, steps.label, -1)[0, :n])
    assert trace.about.deterministic
    # Every example is on the shelf from the step on at which its label is told.
    shown = _example_steps(arrays)
    examples = [t for t in range(n) if not arrays["query"][t] and (labels != "ask" or arrays["told"][t] >= 0)]
    delay = labels == "delayed"
    assert [s for s, _ in shown if s in examples] == examples
    assert all(known == s + delay and arrays["told"][known] == arrays["label"][s] for s, known in shown)
    with av.open(str(tmp_path / "film.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == n + HOLD * FPS
    difference, album = replay(trace, render=False)
    assert difference is None
    album.close()


def test_frames_show_the_right_label_and_the_examples(call: Any, few_shot: Path, tmp_path: Path) -> None:
    trace = watch(call, few_shot, tmp_path, "--level", LEVEL)
    _, album = replay(trace, render=True)
    film, arrays = FewShotFilm(trace, album), trace.arrays
    pitch = GAME / 5
    for t in range(len(arrays["answer"])):
        frame = film.frame(t)
        columns = [
            frame[COLUMNS[1] : COLUMNS[0] - 2, round(MARGIN + i * pitch) : round(MARGIN + (i + 1) * pitch)]
            for i in range(5)
        ]
        framed = [i for i, column in enumerate(columns) if (column == GREEN).all(-1).sum() > 60]
        assert framed == [answer for answer in arrays["answer"][t : t + 1] if answer >= 0]
        shelf = frame[390:605, MARGIN : MARGIN + GAME]
        assert (shelf == ORANGE).all(-1).any() == bool(arrays["own"][t])  # the example that was just told
    assert film.frame(t, over=True).shape == (720, 1280, 3)
    album.close()


def test_a_trace_without_all_notes_is_damaged(call: Any, few_shot: Path, tmp_path: Path) -> None:
    trace = watch(call, few_shot, tmp_path, "--level", LEVEL)
    msgspec.structs.replace(trace, arrays={k: v for k, v in trace.arrays.items() if k != "told"}).save(
        tmp_path / "x.npz"
    )
    with pytest.raises(UserError, match="damaged"):
        load_trace(tmp_path / "x.npz")


def test_two_parts_are_filmed(
    call: Any, few_shot_folder: Path, train_few_shot: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "other").symlink_to(few_shot_folder)
    run = train_few_shot(data=f"{few_shot_folder},{tmp_path / 'other'}", ways=3, labels="delayed", core="lstm")
    assert set(watch(call, run, tmp_path).arrays["part"]) == {0, 1}


def test_the_running_accuracy_is_that_of_the_episode() -> None:
    arrays = {
        "starts": np.array([True, False, False, False, True, False]),
        "answer": np.array([1, -1, 2, 0, -1, 1]),
        "actions": np.array([1, 1, 0, 0, 0, 0]),
    }
    assert running_accuracy(arrays).tolist() == [1.0, 1.0, 0.5, pytest.approx(2 / 3), 0.0, 0.0]
