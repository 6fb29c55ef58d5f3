"""`srwm-rl plot` on runs of the real trainer."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.main import main
from srwm_rl.scripts.reports.curves import Curve
from srwm_rl.scripts.reports.plot import STATISTICS, Line, _published_curves, plot_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Train two cores with two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    size = ["--n-envs", "4", "--batch-size", "256", "-n", "768", "--no-progress", "--verbose", "0"]
    for core in ("srwm", "feedforward"):
        for seed in ("0", "1"):
            argv = ["train", "--env", "recall", "--core", core, "--seed", seed, "--log-folder", str(folder), *size]
            assert main(argv) == 0
    return [str(folder / f"ppo_{core}" / f"recall_{i}") for core in ("srwm", "feedforward") for i in (1, 2)]


@pytest.mark.parametrize("name", ["curves.png", "curves.svg", "curves.pdf"])
def test_it_draws_a_line_per_setting(runs: list[str], tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    assert main(["plot", *runs, "-o", str(output), "--statistic", "iqm"]) == 0
    if name.endswith("png"):
        pixels = imread(output)
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100  # two lines, two bands, text
    if name.endswith("svg"):
        text = output.read_text()
        for words in ("srwm (iqm of 2 seeds)", "feedforward (iqm of 2 seeds)", "rollout/ep_rew_mean", "recall"):
            assert f"<!-- {words} -->" in text


def test_the_same_runs_give_the_same_file(runs: list[str], tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        plot_runs(runs, tmp_path / name, None, "hours", "mean")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "name one run folder"),
        (("RUN", "-o", "curves.jpg"), "must end in .png, .svg, .pdf"),
        (("RUN", "--y", "rollout/ep_rew_men"), "did you mean 'rollout/ep_rew_mean'"),
        (("RUN", "--labels", "a", "b"), "2 labels for 1 lines"),
        (("RUN", "RUN"), "is given twice"),
        (("RUN", "--published"), "only for runs on one game in easy mode: bigfish, coinrun"),
        (("RUN", "--published", "--y", "train/value_loss"), "of rollout/ep_rew_mean and eval_test/mean_reward, not"),
        (("RUN", "--published", "--x", "hours"), "leave out --x hours"),
        (("nothing",), "nothing"),
    ],
)
def test_wrong_input_is_refused(
    runs: list[str], tmp_path: Path, argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [runs[0] if word == "RUN" else word for word in argv]
    words += [] if "-o" in words else ["-o", str(tmp_path / "x.png")]
    assert main(["plot", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_labels_name_the_lines(runs: list[str], tmp_path: Path) -> None:
    plot_runs(runs, tmp_path / "x.svg", "train/value_loss", "steps", "median", ["memory", "none"])
    text = (tmp_path / "x.svg").read_text()
    assert "<!-- memory (median of 2 seeds) -->" in text
    assert "train/value_loss" in text
    with pytest.raises(UserError, match="no 'rollout/accuracy' yet"):
        plot_runs(runs, tmp_path / "y.svg", "rollout/accuracy", "steps", "mean")


def test_the_interquartile_mean_is_of_the_middle_half() -> None:
    values = np.array([[0.0], [1.0], [2.0], [30.0]])
    assert STATISTICS["iqm"](values, axis=0) == 1.5


@pytest.mark.parametrize("y", ["rollout/ep_rew_mean", "eval_test/mean_reward"])
def test_a_published_curve_stands_beside_a_game(tmp_path: Path, y: str) -> None:
    """With the value that belongs to the split: 6.1 on training levels, 5.3 on held-out ones, after 1 M steps."""
    run = tmp_path / "starpilot"
    run.mkdir()
    settings = {"env": "starpilot", "core": "srwm"}
    (run / "config.json").write_text(json.dumps({"train": settings, "version": 1}))
    rows = [{"step": step, y: value} for step, value in ((1_000, 1.5), (1_100_000, 4.0))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_runs([str(run)], tmp_path / "x.svg", y, "steps", "mean", published=True)
    assert "<!-- PPO, published -->" in (tmp_path / "x.svg").read_text()
    curves = _published_curves([Line(TrainConfig(env="starpilot"), [Curve(np.array([1.1e6]), np.array([4.0]))])], y)
    assert curves["starpilot"].values.tolist() == [6.1 if y.startswith("rollout") else 5.3]
