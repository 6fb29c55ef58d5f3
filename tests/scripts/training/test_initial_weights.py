"""`--init-from`: a new run from the weights of another agent, whose levels it counts among its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl import load
from srwm_rl.storage.model_file import policy_arrays
from srwm_rl.storage.run_folder import Run

NEW = ("--env", "recall", "--n-envs", "4", "--n-steps", "16", "--batch-size", "32", "--n-threads", "1", "--seed", "9")
NEW = (*NEW, "--lr-decay", "none", "--no-progress", "--verbose", "0", "--levels", "20:32", "--eval-levels", "100:108")


@pytest.fixture
def train(call: Any, tmp_path: Path) -> Any:
    """Return a function that trains a run from weights and returns its folder."""

    def run(*argv: object, name: str = "new", n: int = 64) -> Path:
        result = call("train", *NEW, "-n", n, "-f", tmp_path / name, *argv)
        assert result.code == 0, result.err
        return next((tmp_path / name).glob("ppo_*/recall_1"))

    return run


def assert_same_weights(ours: Path | str, theirs: Path | str) -> None:
    weights, expected = (policy_arrays(load(path).policy) for path in (ours, theirs))
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(weights[name], array, err_msg=name)


def test_weights_network_and_levels_are_the_agents(recall: Path, train: Any) -> None:
    run = train("--init-from", recall, "--learning-rate", 0)  # the network's settings are given by the agent alone
    assert_same_weights(run, recall)
    agent = load(run)
    assert agent.num_timesteps == 64
    assert agent.levels_played is not None
    trained = load(recall).levels_played
    assert trained is not None
    before = set(trained.among("recall", range(1000)))
    assert before
    assert before <= set(range(12))
    played = set(agent.levels_played.among("recall", range(1000)))
    assert played & set(range(12)) == before
    assert played - before <= set(range(20, 32))
    assert played - before
    assert agent.levels_played.is_complete("recall")


def test_it_learns_on_and_resumes_exactly(recall: Path, train: Any, call: Any) -> None:
    whole = train("-i", recall, name="whole", n=128)
    run = train("-i", recall, n=64)
    assert call("train", "--resume", run, "-n", 128, "--no-progress", "--verbose", "0").code == 0
    assert_same_weights(run, whole)
    names = policy_arrays(load(run).policy)
    assert any((array != policy_arrays(load(recall).policy)[name]).any() for name, array in names.items())
    assert "leave out --init-from" in call("train", "--resume", run, "-i", "zoo:recall").error()


def test_a_model_names_the_agent_without_its_folder(recall: Path, train: Any) -> None:
    run = train("--init-from", recall)
    assert load(run).config["init_from"] == "recall_1"
    assert Run.open(run).config["train"]["init_from"] == str(recall)


def test_a_settings_file_can_name_it(recall: Path, train: Any, tmp_path: Path) -> None:
    file = tmp_path / "settings.yml"
    file.write_text(f"init_from: {recall}\nlearning_rate: 0\n")
    assert_same_weights(train("--config", file), recall)


def test_the_agents_that_come_with_the_package(train: Any) -> None:
    run = train("-i", "zoo:recall", "--learning-rate", 0)
    assert_same_weights(run, "zoo:recall")
    assert load(run).config["init_from"] == "zoo:recall"


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--core", "lstm"], "its core is srwm, not lstm; leave out --core"),
        (["--core-kwargs", "hidden_size:8"], "is of another architecture: weight "),
        (["--env", "bandit"], "its actions are Discrete(4), not Discrete(5)"),
        (["--attempts", "2"], "its observation attempt_begins is missing, not Box(0.0, 1.0, (1,), float32)"),
        (["--inputs", "action"], "its observation episode_step is Box(0.0, inf, (1,), float32), not missing"),
    ],
)
@pytest.mark.parametrize("option", [(), ("--dry-run",)])
def test_another_network_is_refused(
    argv: list[str], part: str, option: tuple[str, ...], recall: Path, call: Any, untouched: Path
) -> None:
    environment = [] if "--env" in argv else ["--env", "recall"]
    argv = ["train", *environment, *argv, *option, "-n", "64", "-f", str(untouched), "--no-progress"]
    message = call(*argv, "--init-from", recall).error()
    assert message.startswith(f"--init-from {recall}")
    assert part in message


def test_what_is_no_agent_is_refused(call: Any, tmp_path: Path) -> None:
    assert "there is no run at" in call("train", *NEW, "-i", tmp_path / "nowhere").error()
    assert "did you mean 'recall'" in call("train", *NEW, "-i", "zoo:recal").error()


def test_the_plan_names_the_weights(recall: Path, call: Any) -> None:
    plan = call("train", *NEW, "-i", recall, "--dry-run").out
    assert f"  weights   of {recall}\n" in plan
