"""`srwm-rl bench`: every kind runs, writes its figures, and refuses to time what is wrong. Nothing here is a speed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from srwm_rl.files import pack
from srwm_rl.ops import cpu
from srwm_rl.scripts.benchmarks import bound, encoder, environments, measure, training
from srwm_rl.scripts.training.build import make_env


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(measure, "SECONDS", 0.05)  # no test looks at a speed
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def result(call: Any, tmp_path: Path, *words: object) -> dict[str, Any]:
    said = call("bench", *words, "--json", tmp_path / "bench.json", "--rounds", 2, "--threads", 1)
    assert said.code == 0, said
    found: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    assert found["torch"] == torch.__version__
    return found


def test_env(call: Any, tmp_path: Path) -> None:
    found = result(call, tmp_path, "env", "--n-envs", 4, "--n-steps", 10)
    assert [row["name"] for row in found["rows"]] == ["raw ProcGen", "ProcgenVecEnv", "with memory inputs"]
    assert all(row["steps_per_second"]["median"] > 0 for row in found["rows"])


def test_encoder(call: Any, tmp_path: Path) -> None:
    found = result(call, tmp_path, "encoder", "--n-frames", 4)
    assert {row["work"] for row in found["rows"]} == {"forward", "forward and backward"}
    assert all(row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"] for row in found["rows"])


@pytest.mark.parametrize(
    "more", [[], ["--algo", "impala"], *(["--against", other] for other in ("feedforward", "sb3-contrib", "reference"))]
)
def test_train(more: list[str], call: Any, tmp_path: Path) -> None:
    words = ["train", "--env", "recall", "--n-envs", 4, "--n-steps", 8, "--batch-size", 16, "--n-epochs", 2, *more]
    found = result(call, tmp_path, *words)
    ours = found["rows"]["srwm-rl"]
    assert all(ours[part]["median"] > 0 for part in ("collect", "learn", "both"))
    most = found["bound"]
    assert most["bound"] == pytest.approx(1 / (1 / most["E"] + 1 / most["A"] + most["k"] / most["L"]))
    reached = found["reached"]
    assert 0 < reached["low"] <= reached["median"] <= reached["high"]
    assert ("ratio" in found) == ("--against" in more)
    assert ("peak_mib" in found) == ("sb3-contrib" in more)


def test_train_on_frames_against_sb3_contrib(call: Any, tmp_path: Path) -> None:
    words = ["--n-envs", 2, "--n-steps", 4, "--batch-size", 8, "--n-epochs", 1, "--against", "sb3-contrib"]
    assert set(result(call, tmp_path, "train", *words)["rows"]) == {"srwm-rl", "sb3-contrib"}


def test_updates_go_on_for_a_while_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = training.TrainBench(env="recall", n_envs=4, n_steps=8, batch_size=16, n_epochs=1)
    update = training._updater(training._ours(config))
    steps, collecting, learning = update()
    assert collecting + learning >= 0.05
    assert steps % 32 == 0
    assert steps > 32
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    assert update()[0] == 32


def test_timing_the_parts_leaves_the_trainer_where_it_was() -> None:
    config = training.TrainBench(env="recall", n_envs=4, n_steps=8, batch_size=16, n_epochs=1)
    model = training._ours(config)
    training._updater(model)()
    env: Any = model.env

    def where() -> Any:
        assert model._core_state is not None
        tensors = [model._core_state, *model.policy.parameters(), torch.get_rng_state()]
        arrays = [each.detach().numpy().copy() for each in tensors]
        return pack([env.get_state(), model._last_obs, model.num_timesteps, arrays])

    before = where()
    speeds = bound.speeds_of(bound.parts_of(model, make_env(training._train_config(config)), config.batch_size))
    assert min(speeds.values()) > 0
    (arrays, rest), (arrays_before, rest_before) = where(), before
    assert rest == rest_before
    assert arrays.keys() == arrays_before.keys()
    assert all(np.array_equal(arrays[name], arrays_before[name]) for name in arrays)
    assert all(each.grad is None for each in model.policy.parameters())


def test_a_policy_with_other_results_is_not_timed(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = cpu.scan
    monkeypatch.setattr(cpu, "scan", lambda *given: tuple(each * 1.01 for each in scan(*given)))
    said = call("bench", "train", "--env", "bandit", "--n-envs", 4, "--against", "reference").error()
    assert "differ from the reference" in said


def test_a_policy_that_forgets_to_begin_episodes_anew_is_not_timed(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = cpu.scan
    monkeypatch.setattr(cpu, "scan", lambda x, weight, *more: scan(x, weight, *without_starts(more)))
    said = call("bench", "train", "--env", "bandit", "--n-envs", 4, "--against", "reference").error()
    assert "differ from the reference" in said


def without_starts(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if getattr(each, "dtype", None) is torch.uint8 else each for each in arguments)


def test_an_encoder_with_other_features_is_not_timed(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = encoder.PlainCNN.forward
    monkeypatch.setattr(encoder.PlainCNN, "forward", lambda self, frames: forward(self, frames) * 1.01)
    assert "gives other features" in call("bench", "encoder", "--n-frames", 4).error()


def test_environments_that_differ_are_not_timed(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments.np, "array_equal", lambda *_: False)
    assert "nothing was timed" in call("bench", "env", "--n-envs", 2).error()


def test_sides_take_turns_and_ratios_are_of_the_same_round() -> None:
    order: list[str] = []

    def side(name: str) -> Any:
        return lambda: order.append(name) or 10

    rates = measure.alternate({"a": side("a"), "b": side("b")}, 3)
    assert order == ["a", "b"] * 4
    assert {name: len(each) for name, each in rates.items()} == {"a": 3, "b": 3}
    found = measure.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 4.0])
    assert found == (2.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trian"], "did you mean 'train'"),
        (["op", "--device", "tpu"], "--device must be cpu or cuda"),
        (["encoder", "--rounds", "0"], "--rounds must be at least 1"),
        (["env", "--json", "/nowhere/at/all.json"], "there is no folder"),
        (["train", "--algo", "impala", "--against", "sb3-contrib", "--env", "recall"], "compares PPO with PPO"),
    ],
)
def test_wrong_input(words: list[str], part: str, call: Any) -> None:
    assert part in call("bench", *words).error()


def test_help(call: Any) -> None:
    said = call("bench", "--help")
    assert said.code == 0
    assert all(kind in said.out for kind in ("op", "env", "encoder", "train"))
