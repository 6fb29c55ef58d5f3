"""`srwm-rl bench`: every kind runs, writes its report, and does not time wrong results. No test checks a speed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from srwm_rl.ops import cpu
from srwm_rl.scripts.benchmarks import (
    encoder,
    environments,
    measure,
    suite,
    trainers,
    training,
)
from srwm_rl.scripts.benchmarks.run import read
from srwm_rl.scripts.commands import bench


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(measure, "SECONDS", 0.05)  # no test looks at a speed
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def result(call: Any, tmp_path: Path, *argv: object) -> dict[str, Any]:
    output = call("bench", *argv, "--json", tmp_path / "bench.json", "--rounds", 2, "--threads", 1)
    assert output.code == 0, output
    report: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    assert report["torch"] == torch.__version__
    return report


def test_env(call: Any, tmp_path: Path) -> None:
    report = result(call, tmp_path, "env", "--n-envs", 4, "--n-steps", 10)
    assert [row["name"] for row in report["rows"]] == ["raw ProcGen", "ProcgenVecEnv", "with memory inputs"]
    assert all(row["steps_per_second"]["median"] > 0 for row in report["rows"])


def test_encoder(call: Any, tmp_path: Path) -> None:
    report = result(call, tmp_path, "encoder", "--n-frames", 4)
    assert {row["work"] for row in report["rows"]} == {"forward", "forward and backward"}
    assert all(row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"] for row in report["rows"])


OTHERS = ("feedforward", "gru", "lstm", "sb3-contrib", "reference", "autograd", "plain-cnn")


@pytest.mark.parametrize("more", [[], ["--algo", "impala"], *(["--against", other] for other in OTHERS)])
def test_train(more: list[str], call: Any, tmp_path: Path) -> None:
    argv = ["train", "--env", "recall", "--n-envs", 4, "--n-steps", 8, "--batch-size", 16, "--n-epochs", 2, *more]
    report = result(call, tmp_path, *argv)
    ours = report["rows"]["srwm-rl"]
    assert all(ours[part]["median"] > 0 for part in ("collect", "learn", "both"))
    most = report["bound"]
    assert most["bound"] == pytest.approx(1 / (1 / most["E"] + 1 / most["A"] + most["k"] / most["L"]))
    reached = report["reached"]
    assert 0 < reached["low"] <= reached["median"] <= reached["high"]
    assert ("ratio" in report) == ("--against" in more)
    assert ("peak_mib" in report) == ("sb3-contrib" in more)


def test_another_core_has_as_many_parameters_and_layers() -> None:
    config = trainers.TrainBench(env="recall", n_envs=2, n_steps=4, batch_size=8, core_kwargs=("n_layers:2",))
    ours = trainers.make_ours(config)
    other = trainers.make_other_core(config, ours, "gru").policy.core
    assert other.state_layers == 2
    sizes = [sum(parameter.numel() for parameter in core.parameters()) for core in (ours.policy.core, other)]
    assert abs(sizes[1] / sizes[0] - 1) < 0.05


def test_the_core_without_memory_is_as_wide_and_deep() -> None:
    settings = ("hidden_size:48", "n_layers:3", "n_heads:2")  # the last one it does not have
    config = trainers.TrainBench(env="recall", n_envs=2, n_steps=4, batch_size=8, core_kwargs=settings)
    other = trainers.make_other_core(config, trainers.make_ours(config), "feedforward").policy.core
    assert (other.output_size, len(other.blocks)) == (48, 3)


def test_train_on_frames_against_sb3_contrib(call: Any, tmp_path: Path) -> None:
    argv = ["--n-envs", 2, "--n-steps", 4, "--batch-size", 8, "--n-epochs", 1, "--against", "sb3-contrib"]
    assert set(result(call, tmp_path, "train", *argv)["rows"]) == {"srwm-rl", "sb3-contrib"}


def test_train_overlapping(call: Any, tmp_path: Path) -> None:
    argv = ["train", "--env", "recall", "--algo", "impala", "--n-envs", 4, "--n-steps", 8, "--batch-size", 16]
    report = result(call, tmp_path, *argv, "--overlapping", "--against", "feedforward")
    assert report["settings"]["overlapping"]
    assert {name: set(row) for name, row in report["rows"].items()} == {"srwm-rl": {"both"}, "feedforward": {"both"}}
    assert set(report["ratio"]) == {"both"}
    assert report["formula"] == "1 / (1/E + 1/A + k/L)"
    assert report["bound"]["bound"] > 0
    assert report["reached"]["low"] > 0


def overlapping() -> Any:
    config = trainers.TrainBench(
        env="recall", algo="impala", overlapping=True, n_envs=4, n_steps=8, batch_size=16, device="cpu"
    )
    return trainers.make_ours(config)


def test_in_a_round_that_overlaps_the_learner_learns() -> None:
    model = overlapping()
    learn, updates = training.timed_training(model), [0]
    for _ in range(2):
        assert learn()["both"] > 0
        updates.append(model._n_updates)
    assert updates == sorted(set(updates))


def test_the_clock_runs_while_learner_and_actors_are_at_work() -> None:
    model, clock = overlapping(), training.ConcurrentTimer()
    end, updates = clock._on_rollout_end, []

    def on_rollout_end() -> None:
        end()
        updates.extend([model._n_updates] if clock.notes else [])

    clock._on_rollout_end = on_rollout_end  # type: ignore[method-assign]
    model.learn(training.MAX_STEPS, clock)
    (first_step, start), *_, (last_step, stop) = clock.notes
    assert stop - start >= measure.SECONDS
    assert last_step == model.num_timesteps - 4  # the step in which the time was over
    assert (last_step - first_step) % 32 == 0
    assert updates[0] > 0
    assert len(updates) == 1 + (last_step - first_step) // 32


def test_updates_go_on_for_a_while_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = trainers.TrainBench(env="recall", n_envs=4, n_steps=8, batch_size=16, n_epochs=1)
    model = trainers.make_ours(config)
    update = training.timed_training(model)
    speeds = update()
    assert model.num_timesteps >= 32
    assert model._n_updates == model.num_timesteps / 32
    assert speeds["both"] == pytest.approx(1 / (1 / speeds["collect"] + 1 / speeds["learn"]))
    assert model.num_timesteps / speeds["both"] >= measure.SECONDS
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    steps = model.num_timesteps
    update()
    assert model.num_timesteps == steps + 32


def test_a_policy_with_other_results_is_not_timed(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = cpu.scan
    monkeypatch.setattr(cpu, "scan", lambda *args: tuple(tensor * 1.01 for tensor in scan(*args)))
    output = call("bench", "train", "--env", "bandit", "--n-envs", 4, "--against", "reference").error()
    assert "differ from the reference" in output


def test_a_policy_that_forgets_to_begin_episodes_anew_is_not_timed(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = cpu.scan
    monkeypatch.setattr(cpu, "scan", lambda x, weight, *more: scan(x, weight, *without_starts(more)))
    output = call("bench", "train", "--env", "bandit", "--n-envs", 4, "--against", "reference").error()
    assert "differ from the reference" in output


def without_starts(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if getattr(argument, "dtype", None) is torch.uint8 else argument for argument in arguments)


def test_an_encoder_with_other_features_is_not_timed(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = encoder.PlainCNN.forward
    monkeypatch.setattr(encoder.PlainCNN, "forward", lambda self, frames: forward(self, frames) * 1.01)
    assert "gives other features" in call("bench", "encoder", "--n-frames", 4).error()


def test_environments_that_differ_are_not_timed(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments.np, "array_equal", lambda *_: False)
    assert "nothing was timed" in call("bench", "env", "--n-envs", 2).error()


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["trian"], "did you mean 'train'"),
        (["op", "--device", "tpu"], "--device takes one of 'cpu', 'cuda', not 'tpu'"),
        (["encoder", "--rounds", "0"], "--rounds must be at least 1"),
        (["env", "--json", "/nowhere/at/all.json"], "/nowhere/at is no folder to write in"),
        (["train", "--algo", "impala", "--against", "sb3-contrib", "--env", "recall"], "compares PPO with PPO"),
        (["train", "--overlapping"], "--overlapping is impala's; give --algo impala"),
        (["encoder", "--device", "tpu"], "there is no device 'tpu'"),
        (["suite", "--out", "here", "--only", "bench_oop"], "did you mean 'bench_op'?"),
        (
            ["suite", "--out", "here", "--device", "cpu", "--only", "bench_gpu_op"],
            "no benchmark 'bench_gpu_op' for cpu",
        ),
    ],
)
def test_wrong_input(argv: list[str], part: str, call: Any) -> None:
    assert part in call("bench", *argv).error()


def test_help(call: Any) -> None:
    output = call("bench", "--help")
    assert output.code == 0
    assert all(kind in output.out for kind in bench.KINDS)


RESULTS = Path(__file__).parents[3] / "docs" / "results"


@pytest.mark.parametrize("benchmark", suite.BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_the_suite_runs_what_the_results_were_made_with(benchmark: suite.Benchmark) -> None:
    config = read(benchmark.arguments.split(), bench.PROG)
    assert getattr(config, "device", benchmark.device) == benchmark.device
    file = RESULTS / f"{benchmark.name}.json"
    settings = json.loads(file.read_text()).get("settings", {}) if file.exists() else {}
    for name in settings.keys() - {"rounds", "device"}:
        value = getattr(config, name)
        assert (list(value) if isinstance(value, tuple) else value) == settings[name], name


def test_the_suites_names_are_the_files_of_the_results() -> None:
    names = [benchmark.name for benchmark in suite.BENCHMARKS]
    assert len(names) == len(set(names))
    made_otherwise = {"bench_cores"}  # by one command for each core
    assert {file.stem for file in RESULTS.glob("bench_*.json")} - made_otherwise <= set(names)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("bench_op", r"[\d.]+ to [\d.]+ x the reference"),
        ("bench_env", r"with memory inputs: [01]\.\d\d x raw ProcGen"),
        ("bench_impala", r"[\d,]+ steps/s, \d+% of its bound"),
        ("bench_train_contrib", r"\d+ steps/s, [\d.]+ x sb3-contrib, \d+% of its bound"),
    ],
)
def test_results_are_summarised_in_one_line(name: str, pattern: str) -> None:
    assert re.fullmatch(pattern, suite.summarise(json.loads((RESULTS / f"{name}.json").read_text())))


def test_suite(call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = (
        suite.Benchmark("broken", "cpu", 0, "train --env no_such_env"),
        suite.Benchmark("tiny", "cpu", 0, "env --n-envs 2 --n-steps 4 --rounds 1"),
        suite.Benchmark("long", "cpu", 1e3, "op"),
        suite.Benchmark("elsewhere", "cuda", 0, "op"),
    )
    monkeypatch.setattr(suite, "BENCHMARKS", rows)
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    (folder / "broken.json").write_text("{}")  # of an earlier run
    output = call("bench", "suite", "--out", folder, "--device", "cpu")
    assert output.code == 1
    assert {file.name for file in folder.iterdir()} == {"broken.log", "tiny.json", "tiny.log"}
    assert "raw ProcGen" in (folder / "tiny.log").read_text()
    assert (folder / "tiny.log").read_text() in output.out
    broken, tiny, left_out = output.out.splitlines()[-3:]
    assert re.fullmatch(r"broken +\d+ s  FAILED: exit code 2: srwm-rl: error: .*no_such_env.*", broken)
    assert re.fullmatch(r"tiny +\d+ s  with memory inputs: [\d.]+ x raw ProcGen", tiny)
    assert left_out == "skipped, because 8 minutes are not enough: long"


def test_a_benchmark_that_takes_longer_than_is_left_is_ended(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(suite, "BENCHMARKS", (suite.Benchmark("long", "cpu", 0, "train --env recall --rounds 1000"),))
    output = call("bench", "suite", "--out", tmp_path / "new", "--device", "cpu", "--minutes", 0.05)
    assert output.code == 1
    assert re.fullmatch(r"long +\d+ s  FAILED: stopped, the time was over", output.out.splitlines()[-1])
    assert not (tmp_path / "new" / "long.json").exists()


def test_only_what_was_named_is_run(call: Any, tmp_path: Path) -> None:
    argv = ["--device", "cpu", "--minutes", 0, "--only", "bench_impala", "bench_op"]
    output = call("bench", "suite", "--out", tmp_path, *argv)
    assert output.code == 0
    assert output.out == "skipped, because 0 minutes are not enough: bench_op, bench_impala\n"
