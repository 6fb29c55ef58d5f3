"""Every example runs, with few steps."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from srwm_rl.nn.cores import _CORES

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = [
    *("cartpole_without_velocities", "own_core", "own_encoder", "sb3_contrib_recurrent_ppo", "train_srwm"),
    "watch_the_edits",
]


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield import_module(request.param)
    sys.modules.pop(request.param)
    _CORES.pop("decay", None)


def test_all_examples_are_tested() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == NAMES


@pytest.mark.parametrize("example", ["train_srwm"], indirect=True)
def test_ppo_of_ones_own_trains_every_parameter(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    args = example.Args(total_steps=3 * 64, n_envs=4, n_steps=16, n_minibatches=2, n_epochs=1)
    example.main(args)
    assert capsys.readouterr().out.count("loss") == 3
    assert len(Path(example.__file__).read_text().splitlines()) <= 120


@pytest.mark.parametrize("example", ["own_core"], indirect=True)
def test_a_core_of_ones_own_is_checked_and_trains(example: Any) -> None:
    assert type(example.main(128).policy.core).__name__ == "Decay"


@pytest.mark.parametrize("example", ["own_encoder"], indirect=True)
def test_an_encoder_of_ones_own_is_trained_saved_and_loaded(example: Any, tmp_path: Path) -> None:
    model = example.main(1024)
    encoder, obs = model.policy.features_extractor, np.zeros((3, 4), np.float32)
    assert (type(encoder).__name__, model.policy.features_dim) == ("Fourier", 32)
    assert encoder.frequencies.grad.abs().max() > 0
    model.save(tmp_path / "model")
    state, expected = (m.predict(obs, deterministic=True)[1][0] for m in (type(model).load(tmp_path / "model"), model))
    np.testing.assert_array_equal(state, expected)


@pytest.mark.parametrize("example", ["watch_the_edits"], indirect=True)
def test_the_edits_of_each_head_are_printed(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    edits = example.main([], n_steps=20, total_steps=2048)
    assert edits.shape == (20, 4)
    assert np.all(edits > 0)
    assert len(capsys.readouterr().out.splitlines()) == 21


@pytest.mark.parametrize("example", ["cartpole_without_velocities"], indirect=True)
def test_cartpole_shows_no_velocities(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    env = example.PositionsOnly(gymnasium.make("CartPole-v1"))
    observation, _ = env.reset(seed=0)
    assert observation.tolist() == env.unwrapped.state.astype(np.float32)[[0, 2]].tolist()
    example.main("gru", seeds=(1, 2), n_steps=1024)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["gru seed 1", "gru seed 2"]


@pytest.mark.parametrize("example", ["sb3_contrib_recurrent_ppo"], indirect=True)
def test_recurrent_ppo_trains_the_policy(example: Any) -> None:
    assert example.main(128, n_eval_episodes=1) > 0
