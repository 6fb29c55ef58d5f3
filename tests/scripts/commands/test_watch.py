"""`srwm-rl watch` and `srwm-rl replay`: films in portable formats, traces that replay exactly."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import av
import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image

from srwm_rl.scripts.main import main
from srwm_rl.scripts.video import encoding as video
from srwm_rl.scripts.video import record
from srwm_rl.scripts.video.film import GAME, HOLD, MARGIN, SIZE
from srwm_rl.scripts.video.record import first_difference
from srwm_rl.scripts.video.trace import load_trace

TOP = 92  # of the game
PANEL = slice(MARGIN + GAME + 30, SIZE[0])


@pytest.fixture(scope="session")
def games(tmp_path_factory: pytest.TempPathFactory, procgen_argv: list[str]) -> Path:
    """Return a run on two games."""
    logs = tmp_path_factory.mktemp("watched")
    argv = ["train", "--env", "maze,starpilot", *procgen_argv, "-n", "64", "--verbose", "0", "-f", str(logs)]
    assert main(argv) == 0
    return logs / "ppo_srwm" / "maze+starpilot_1"


class Drawn(gymnasium.Env[Any, Any]):
    """A dot moved by the actions, rendered as an image."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    observation_space = spaces.Box(-9.0, 9.0, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode: str | None = None, broken: bool = False, drift: bool = False) -> None:
        self.render_mode, self.broken, self.drift = render_mode, broken, drift

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.position.copy(), {}

    def step(self, action: Any) -> Any:
        self.position = np.clip(self.position + action / 4, -2, 2).astype(np.float32)
        return self.position.copy(), float(-np.abs(self.position).sum()), False, False, {}

    def render(self) -> Any:
        if self.broken:
            raise RuntimeError("no screen")
        picture = np.full((60, 90, 3), 30, np.uint8)
        x, y = (30 + 10 * self.position).astype(int)
        picture[y - 4 : y + 4, x - 4 : x + 4] = 255
        return picture


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on `Drawn`, with an LSTM, whose actions are numbers and whose episodes never end."""
    if "Drawn-v0" not in gymnasium.registry:
        gymnasium.register("Drawn-v0", entry_point=f"{__name__}:Drawn", max_episode_steps=50)
    sys.modules.setdefault(__name__, sys.modules[Drawn.__module__])
    logs = tmp_path_factory.mktemp("drawn")
    argv = [
        "--env",
        "Drawn-v0",
        "--core",
        "lstm",
        "--core-kwargs",
        "hidden_size:8",
        "--n-envs",
        "2",
        "--n-steps",
        "16",
    ]
    argv += ["--batch-size", "32", "--n-threads", "1", "-n", "32", "--no-progress", "--verbose", "0", "-f", str(logs)]
    assert main(["train", *argv]) == 0
    return logs / "ppo_lstm" / "Drawn-v0_1"


def frames(path: Path) -> tuple[Any, np.ndarray]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        return (stream.codec_context.name, stream.codec_context.pix_fmt, int(stream.average_rate or 0)), pictures


def moved(first: np.ndarray, second: np.ndarray) -> int:
    """Count the pixels that differ by more than the encoder's error."""
    return int((np.abs(first.astype(int) - second.astype(int)).max(-1) > 40).sum())


def test_a_film_of_procgen(call: Any, games: Path, tmp_path: Path, snapshot: Any) -> None:
    before = snapshot(games)
    film, trace = tmp_path / "film.mp4", tmp_path / "film.npz"
    result = call("watch", games, "--game", "starpilot", "--steps", 12, "-o", film, "--trace", trace)
    assert result.code == 0, result
    assert result.err == ""
    for part in ("starpilot, held-out level 1000, 12 steps, 1 episode(s), the last one cut short", str(trace)):
        assert part in result.out
    about, pictures = frames(film)
    assert about == ("h264", "yuv420p", 15)
    assert pictures.shape == (12 + HOLD * 15, SIZE[1], SIZE[0], 3)
    game = pictures[:, TOP : TOP + GAME, MARGIN : MARGIN + GAME]
    assert game.std() > 5
    assert all(moved(game[t], game[t + 1]) for t in range(11)), "the stars of starpilot never stand still"
    panel = pictures[:, :, PANEL]
    assert all(moved(panel[t], panel[t + 1]) > 200 for t in range(11)), "every step fills some of the panel"
    assert moved(pictures[12], pictures[-1]) < 200, "the result stays"
    assert moved(pictures[11][:TOP, : MARGIN + GAME], pictures[12][:TOP, : MARGIN + GAME])
    assert film.read_bytes().index(b"moov") < film.read_bytes().index(b"mdat"), "the index does not stand in front"
    assert trace.stat().st_size < 60_000
    assert snapshot(games) == before
    assert {path.name for path in tmp_path.iterdir()} == {"film.mp4", "film.npz"}


def test_a_traces_film_is_the_same(call: Any, games: Path, tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("a.mp4", "b.mp4", "a.npz", "c.npz")]
    argv = ("watch", games, "--steps", 5, "--seed", 3, "--level", 7)
    assert "training level 7" in call(*argv, "-o", names[0], "--trace", names[2]).out
    result = call("replay", names[2], "-o", names[1])
    assert result.code == 0, result
    assert "maze, level 7, 5 steps: every observation and reward as recorded" in result.out
    assert names[0].read_bytes() == names[1].read_bytes()
    assert call(*argv, "-o", names[0], "--trace", names[3]).code == 0
    first, second = load_trace(names[2]), load_trace(names[3])
    assert first.digest == second.digest
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, second.arrays[name])
    assert call("watch", games, "--steps", 5, "--seed", 4, "-o", names[0], "--trace", names[3]).code == 0
    assert (load_trace(names[3]).arrays["actions"] != first.arrays["actions"]).any()


def test_a_task_shows_what_is_observed(call: Any, recall: Path, tmp_path: Path) -> None:
    film, trace = tmp_path / "film.mp4", tmp_path / "film.npz"
    result = call("watch", recall, "--deterministic", "-o", film, "--trace", trace)
    arrays = load_trace(trace).arrays
    n_steps = len(arrays["rewards"])
    assert (
        f"recall, held-out level 100, {n_steps} steps, 1 episode(s), {int(arrays['solved'][-1])} of 1 solved"
        in result.out
    )
    assert arrays["dones"].tolist() == [False] * (n_steps - 1) + [True]
    np.testing.assert_array_equal(arrays["actions"], arrays["choices"].argmax(-1))
    about, pictures = frames(film)
    assert about == ("h264", "yuv420p", 4)
    assert len(pictures) == n_steps + HOLD * 4
    observed = pictures[:, TOP : TOP + GAME, MARGIN : MARGIN + GAME]
    assert all(moved(observed[t], observed[t + 1]) > 200 for t in range(n_steps - 1))


def test_several_episodes_are_on_the_levels_that_follow(call: Any, recall: Path, tmp_path: Path) -> None:
    trace = tmp_path / "a.npz"
    assert call("watch", recall, "--steps", 40, "--level", 103, "-o", tmp_path / "a.gif", "--trace", trace).code == 0
    arrays = load_trace(trace).arrays
    assert len(arrays["rewards"]) == 40
    np.testing.assert_array_equal(arrays["levels"], 103 + np.cumsum(arrays["starts"]) - 1)
    assert arrays["starts"].sum() > 2
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.format, gif.size) == ("GIF", SIZE)
        assert gif.n_frames == 41  # type: ignore[attr-defined]  # equal frames become one
    assert call("replay", trace).code == 0


def test_gymnasiums_own_pictures_and_a_memory_without_heads(call: Any, drawn: Path, tmp_path: Path) -> None:
    film, trace = tmp_path / "film.mp4", tmp_path / "film.npz"
    result = call("watch", drawn, "-o", film, "--trace", trace)
    assert (result.code, result.err) == (0, "")
    about, pictures = frames(film)
    assert about == ("h264", "yuv420p", 30)
    assert len(pictures) == 50 + HOLD * 30
    game = pictures[:, TOP : TOP + GAME, MARGIN : MARGIN + GAME]
    assert (game[0] > 200).all(-1).sum() > 500, "the dot"
    assert (game[0, :60] < 40).all(), "a wide picture keeps its shape"
    assert sum(moved(game[t], game[t + 1]) > 0 for t in range(49)) > 30
    arrays = load_trace(trace).arrays
    assert arrays["std"].shape == (50, 2)
    assert arrays["edit"].shape == (50, 1, 1)
    assert "rates" not in arrays
    assert call("replay", trace).code == 0


def test_what_cannot_draw_itself_shows_its_observations(
    call: Any, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Drawn, "render", lambda self: 1 / 0)
    result = call("watch", drawn, "--steps", 3, "-o", tmp_path / "film.mp4")
    assert result.code == 0
    assert result.err == (
        "srwm-rl: Drawn-v0 cannot render itself (Drawn-v0 failed in render (environment 0, level 1000000, step 0): "
        "ZeroDivisionError: division by zero); its observations are drawn instead\n"
    )
    assert frames(tmp_path / "film.mp4")[0][2] == 4


def test_an_episode_that_does_not_end_is_cut(
    call: Any, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "MAX_EPISODE", 4)
    result = call("watch", drawn, "-o", tmp_path / "film.gif")
    assert "4 steps, 1 episode(s), the last one cut short, reward" in result.out


def test_the_default_name(call: Any, recall: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("watch", recall, "--gif", "--steps", 2).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["recall_1-recall-100.gif"]


REFUSED = [
    (["--level", "-1"], "--level must lie in [0, 2147483646], not -1"),
    (["--level", "2147483647"], "--level must lie in [0, 2147483646], not 2147483647"),
    (["--level", "x"], "--level takes a whole number"),
    (["--game", "mazes"], "this run was not trained on 'mazes'; known: recall"),
    (["--steps", "0"], "--steps must lie in [1, 100000], not 0"),
    (["--steps", "1000000"], "--steps must lie in [1, 100000], not 1000000"),
    (["--seed", "-1"], "--seed must lie in"),
    (["-o", "film.avi"], "cannot write film.avi: a video's name ends in .mp4 or .gif"),
    (["-o", "film"], "cannot write film: a video's name ends in .mp4 or .gif"),
    (["-o", "nowhere/film.mp4"], "is no folder to write in"),
    (["--trace", "nowhere/film.npz"], "is no folder to write in"),
    (["--trace", "film.json"], "a trace's name ends in .npz"),
    (["--gif", "-o", "film.mp4"], "--gif makes a GIF, and -o names film.mp4"),
    (["--device", "gpu"], "there is no device 'gpu'"),
    (["--env", "other-v0"], "--env other-v0"),
]


@pytest.mark.parametrize(("argv", "part"), REFUSED)
def test_wrong_input_is_refused_before_playing(
    argv: list[str], part: str, call: Any, recall: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(untouched)
    result = call("watch", recall, *argv)
    assert part in result.error()
    assert result.out == ""


def test_no_run_no_model_no_zip(call: Any, recall: Path, tmp_path: Path) -> None:
    assert "there is no run at" in call("watch", tmp_path / "nothing").error()
    run = shutil.copytree(recall, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert "has no model: it was stopped before its first checkpoint" in call("watch", run).error()
    file = shutil.make_archive(str(tmp_path / "model"), "zip", recall, "config.json")
    assert "is a zip; give a run folder" in call("watch", file).error()


@pytest.mark.parametrize("missing", ["codec", "package"])
def test_a_codec_that_is_missing(
    missing: str, call: Any, recall: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(untouched)
    if missing == "package":
        monkeypatch.setitem(sys.modules, "av", None)
        part = "an MP4 needs av: pip install av, or name a .gif"
    else:
        monkeypatch.setattr(video, "ENCODERS", ("no_such_encoder",))
        part = "this build of av has no H.264 encoder"
    assert part in call("watch", recall).error()


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory, games: Path) -> Path:
    """Return a trace of five steps of maze."""
    folder = tmp_path_factory.mktemp("trace")
    argv = ["--steps", "5", "-o", str(folder / "a.gif"), "--trace", str(folder / "a.npz"), "--verbose", "0"]
    assert main(["watch", str(games), *argv]) == 0
    return folder / "a.npz"


def changed(trace: Path, path: Path, meta: Any = None, **arrays: Any) -> Path:
    """Write a trace again, with a function over its JSON and other arrays."""
    with np.load(trace) as file:
        content = dict(file)
    content_meta = json.loads(content["meta"].tobytes())
    if meta is not None:
        meta(content_meta)
    content["meta"] = np.frombuffer(json.dumps(content_meta).encode(), np.uint8)
    np.savez(path, **(content | arrays))
    return path


def test_a_trace_holds_no_pickles_and_says_what_replays_it(trace: Path) -> None:
    with np.load(trace, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
        meta = json.loads(file["meta"].tobytes())
    assert meta["scene"] | {"inputs": None} == {
        "env": "maze", "level": 1000, "n_levels": 5, "seed": 0, "mode": "easy", "env_kwargs": [], "inputs": None,
        "reward_clip": 1.0, "attempts": 1, "shuffle_actions": False, "wrapper": [], "atari": False, "frame_stack": 1,
    }  # fmt: skip
    assert next(iter(meta["versions"])).startswith("procgen")


@pytest.mark.parametrize(
    ("name", "step"), [("rewards", 2), ("links", 0), ("links", 4), ("dones", 4), ("solved", 1), ("levels", 3)]
)
def test_another_course_of_events_is_noticed(name: str, step: int, call: Any, trace: Path, tmp_path: Path) -> None:
    array = load_trace(trace).arrays[name].copy()
    array[step] = not array[step] if array.dtype == bool else array[step] + array.dtype.type(1)
    altered = changed(trace, tmp_path / "other.npz", **{name: array})
    result = call("replay", altered, "-o", tmp_path / "film.mp4")
    assert result.code == 1
    what = "observations" if name == "links" else name
    assert f"NOT as recorded: {what} differ from step {step} on; no video was made" in result.out
    assert not (tmp_path / "film.mp4").exists()


def test_another_level_or_digest_is_noticed(call: Any, trace: Path, tmp_path: Path) -> None:
    level = changed(trace, tmp_path / "level.npz", lambda meta: meta["scene"].update(level=999))
    assert "NOT as recorded: observations differ from step 0 on" in call("replay", level).out
    digest = changed(trace, tmp_path / "digest.npz", lambda meta: meta.update(sha256="0" * 64))
    result = call("replay", digest)
    assert (result.code, "sha256 differs" in result.out) == (1, True)


def test_an_environment_of_another_version_is_refused(call: Any, trace: Path, tmp_path: Path) -> None:
    altered = changed(trace, tmp_path / "a.npz", lambda meta: meta.update(versions={"procgen": "0.9"}))
    message = call("replay", altered).error()
    assert "was recorded with procgen 0.9, and here is procgen" in message
    assert "--any-version" in message
    assert call("replay", altered, "--any-version").code == 0


DAMAGES: dict[str, Any] = {
    "format": lambda meta: meta.update(format=2),
    "kind": lambda meta: meta.update(kind="model"),
    "no kind": lambda meta: meta.pop("kind"),
    "scene": lambda meta: meta.pop("scene"),
    "level type": lambda meta: meta["scene"].update(level="1"),
    "level": lambda meta: meta["scene"].update(level=-5),
    "many levels": lambda meta: meta["scene"].update(n_levels=10**12),
    "setting": lambda meta: meta["scene"].update(colour="red"),
    "env": lambda meta: meta["scene"].update(env="mazes"),
    "mode": lambda meta: meta["scene"].update(mode="gentle"),
    "kwargs": lambda meta: meta["scene"].update(env_kwargs=["n_threads:100000000"]),
    "other actions": lambda meta: meta["action_space"].update(n=99),
    "space": lambda meta: meta.update(action_space={"type": "Graph"}),
    "module": lambda meta: meta["scene"].update(env="antigravity:Maze-v0"),
    "about": lambda meta: meta.update(about=[]),
    "steps": lambda meta: meta["about"].update(num_timesteps="many"),
    "training levels": lambda meta: meta["about"].update(levels="0-200"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_trace_with_other_words_is_refused(damage: str, call: Any, trace: Path, tmp_path: Path) -> None:
    result = call("replay", changed(trace, tmp_path / "a.npz", DAMAGES[damage]))
    result.error()
    assert "antigravity" not in sys.modules


def test_a_trace_with_other_arrays_is_refused(call: Any, trace: Path, tmp_path: Path) -> None:
    arrays = load_trace(trace).arrays
    for bad in (
        {"actions": arrays["actions"] + 15},
        {"actions": arrays["actions"][:3]},
        {"rewards": arrays["rewards"] * np.nan},
        {"rewards": np.array([object()] * 5)},
        {"edit": arrays["edit"][0]},
        {"surplus": np.zeros(5)},
        {"starts": ~arrays["starts"]},
        {"choices": np.zeros((5, 3), np.float32)},
        {"rates": np.zeros((5, 1, 1, 4), np.float32)},
        {"std": arrays["choices"]},
        {"dones": arrays["dones"].astype(np.int8)},
    ):
        assert (
            "is no trace of srwm-rl, or is damaged" in call("replay", changed(trace, tmp_path / "a.npz", **bad)).error()
        )


def test_a_damaged_or_foreign_file_is_refused(call: Any, trace: Path, tmp_path: Path) -> None:
    content = trace.read_bytes()
    middle = len(content) // 2
    for blob in (b"", b"hello", content[:middle], content[: middle - 9] + bytes(18) + content[middle + 9 :]):
        (tmp_path / "bad.npz").write_bytes(blob)
        assert "is no trace of srwm-rl, or is damaged" in call("replay", tmp_path / "bad.npz").error()
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    assert "is no trace" in call("replay", tmp_path / "other.npz").error()
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert "is no trace" in call("replay", tmp_path / "array.npy").error()
    assert "cannot read" in call("replay", tmp_path / "nothing.npz").error()
    assert "cannot read" in call("replay", tmp_path).error()
    for output, part in (("film.avi", "ends in .mp4 or .gif"), ("nowhere/film.mp4", "is no folder to write in")):
        assert part in call("replay", trace, "-o", tmp_path / output).error()


def test_a_replay_that_ends_early_is_noticed(trace: Path) -> None:
    recording = load_trace(trace)
    short = {name: array[:3] for name, array in recording.arrays.items()}
    assert first_difference(recording, short, recording.digest) == "the episodes end after step 2"


def test_suppressed_edits_and_ranked_heads_are_in_the_film(call: Any, recall: Path, tmp_path: Path) -> None:
    run, film, recorded = Path(shutil.copytree(recall, tmp_path / "run")), tmp_path / "f.gif", tmp_path / "f.npz"
    argv = ("watch", run, "--steps", 6, "-o", film, "--trace", recorded)
    result = call(*argv, "--undo", "beta,query", "--lesion", "0.1")
    assert result.code == 0, result
    about, costs = load_trace(recorded).about, load_trace(recorded).head_costs
    assert about.intervention == "edits of query, beta undone, no edits in head 0.1"
    assert about.intervention in about.describe_agent()
    assert not load_trace(recorded).arrays["edit"][:, 0, 1].any()
    assert sorted(cost.name for cost in costs) == [f"0.{head}" for head in range(2)]
    assert (run / "head_costs.json").is_file(), "a built-in task's heads are ranked and stored"
    assert call("replay", recorded, "-o", tmp_path / "again.gif").code == 0
    assert call(*argv).code == 0
    assert load_trace(recorded).about.intervention == ""
    assert load_trace(recorded).head_costs == costs


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--undo", "qery"], "--undo: there is no group of columns 'qery'; did you mean 'query'?"),
        (["--lesion", "3"], "--lesion takes layer.head, such as 0.3, not '3'"),
        (["--lesion", "1.0"], "there is no head 1.0"),
    ],
)
def test_wrong_edits_to_suppress_are_refused(argv: list[str], part: str, call: Any, recall: Path) -> None:
    assert part in call("watch", recall, *argv).error()
