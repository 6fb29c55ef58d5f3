"""Runs on environments of other packages, through the commands; skipped where a package is not installed."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Case(NamedTuple):
    """An environment, the modules that it needs, and the options of its run."""

    env: str
    modules: tuple[str, ...]
    options: tuple[str, ...] = ()


CASES = (
    Case("MiniGrid-MemoryS7-v0", ("minigrid",), ("--env-kwargs", "max_steps:20")),
    Case(
        "MiniGrid-MemoryS7-v0",
        ("minigrid",),
        (
            "--wrapper",
            "minigrid.wrappers:OneHotPartialObsWrapper",
            "--frame-stack",
            "2",
            "--env-kwargs",
            "max_steps:20",
        ),
    ),
    Case("popgym-AutoencodeEasy-v0", ("popgym",)),
    Case("popgym-CountRecallEasy-v0", ("popgym",), ("--inputs", "action", "observation")),
    Case(
        "ALE/Pong-v5",
        ("ale_py", "cv2"),
        ("--atari", "--frame-stack", "4", "--env-kwargs", "max_num_frames_per_episode:200"),
    ),
    Case("LunarLander-v3", ("Box2D",), ("--env-kwargs", "max_episode_steps:20", "--attempts", "2")),
    Case("Blackjack-v1", ()),
    Case("Blackjack-v1", (), ("--attempts", "3", "--shuffle-actions")),
    Case("Acrobot-v1", (), ("--env-kwargs", "max_episode_steps:20", "--attempts", "2", "--shuffle-actions")),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join((case.env, *case.options[:2])))
@pytest.mark.filterwarnings("ignore")
def test_train_resume_eval_watch_and_report(
    case: Case, call: Any, procgen_argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in case.modules:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    argv = [*procgen_argv, "--env", case.env, *case.options, "--eval-levels", "1000000:1000002", "-f", "logs"]
    result = call("train", *argv, "-n", 64)
    assert result.code == 0, result
    printed = result.out.rpartition("Now: srwm-rl eval ")[2].split()
    (run,) = (tmp_path / "logs" / "ppo_srwm").iterdir()
    own = printed[1:]
    assert own == ["--wrapper", case.options[1]] if "--wrapper" in case.options else not own
    result = call("train", "--resume", run, "-n", 128, *own)
    assert result.code == 0, result
    assert call("eval", run, "--train-levels", "none", "--random", "--n-envs", 2, *own).code == 0
    assert call("watch", run, "--steps", 5, "-o", "film.gif", "--trace", "film.npz", *own).code == 0
    assert call("replay", "film.npz", *own).code == 0
    options = ("--train-levels", "none", "--n-envs", 2, "--no-rank-heads", "--no-baselines", "-o", "page.html")
    assert call("report", run, *options, *own).code == 0
    assert case.env in (tmp_path / "page.html").read_text()


@pytest.mark.filterwarnings("ignore")
def test_atari_clips_rewards_in_training_and_skips_frames_once(call: Any) -> None:
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    result = call("train", "--env", "ALE/Pong-v5", "--atari", "--print-config")
    assert result.code == 0, result
    settings = dict(line.split(": ", 1) for line in result.out.splitlines() if ": " in line)
    assert (settings["loss_reward_clip"], settings["normalize_reward"]) == ("1.0", "false")
    assert settings["env_kwargs"] == "{frameskip: 1}"


def test_atari_is_for_atari_games(call: Any, untouched: Path) -> None:
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    argv = ("train", "--env", "CartPole-v1", "--atari", "-f", untouched)
    assert "--atari, for Atari games, cannot wrap CartPole-v1" in call(*argv).error()
