"""`srwm-rl train --seeds`: a group of runs, what it prints, how it stops, resumes and fails, and who takes it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import TrainConfig, parse_seeds
from srwm_rl.scripts.seeds import train
from srwm_rl.scripts.seeds.progress import RUNNING, WAITING, SeedProgress, latest
from srwm_rl.scripts.seeds.train import Resources, SeedRun, _stopping, choose_resources
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.run_group import RunGroup, expand_groups
from srwm_rl.storage.safe_file import read_file

FRAGILE = """
import os
import gymnasium
import numpy as np

class Fragile(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    t = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        if "seed_1" in os.environ.get("SRWM_RL_RUN_FOLDER", ""):
            raise RuntimeError("seed 1 is unlucky")
        return np.zeros(2, np.float32), 1.0, self.t == 5, False, {}

gymnasium.register("Fragile-v0", Fragile)
"""


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory, recall_argv: list[str]) -> tuple[Path, str]:
    """Return a finished group of the seeds 3 and 5, and what the command printed."""
    logs = tmp_path_factory.mktemp("group")
    argv = [*recall_argv, "--seeds", "3,5", "--jobs", "2", "-n", "256", "--eval-freq", "128", "-f", str(logs)]
    command = [sys.executable, "-m", "srwm_rl", "train", *argv]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert result.stderr == ""
    return logs / "ppo_srwm" / "recall_1", result.stdout


def weights(run: Path) -> dict[str, Any]:
    return read_file(Run.open(run).files("model")[-1])[0]


@pytest.mark.parametrize(("text", "seeds"), [("0:3", [0, 1, 2]), ("0,3,7", [0, 3, 7]), ("4", [4]), ("9:10", [9])])
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "5:5", "5:3", "0,0", "-1:2", "a", "0:5:2", "0:9999999999", "2147483648", "1,"])
def test_no_seeds(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--seeds", "0:2", "--seed", "1"], "leave out --seed"),
        (["--seeds", "x"], "--seeds takes start:stop, such as 0:5, or a list, such as 0,3,7, not 'x'"),
        (["--jobs", "2"], "--jobs is for several runs: give --seeds too"),
    ],
)
def test_what_makes_no_sense_is_refused(argv: list[str], part: str, call: Any, untouched: Path) -> None:
    assert part in call("train", "--env", "recall", "-f", untouched, *argv).error()


def test_seeds_of_a_resumed_run_are_refused(call: Any, recall: Path) -> None:
    assert "leave it out to resume" in call("train", "--resume", recall, "--seeds", "0:2").error()


def test_torchrun_is_refused(call: Any, group: Any, untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("srwm_rl.scripts.commands.train.run_rank", lambda command, argv: None)
    assert "without torchrun" in call("train", "--env", "recall", "--seeds", "0:2", "-f", untouched).error()
    assert "without torchrun" in call("train", "--resume", group[0]).error()


@pytest.mark.parametrize(
    ("cores", "n_runs", "settings", "jobs", "threads"),
    [
        (2, 5, {}, 2, 1),
        (8, 3, {}, 3, 2),
        (8, 5, {"n_threads": 4}, 2, 4),
        (2, 5, {"n_threads": 4}, 1, 4),
        (2, 5, {"jobs": 4}, 4, 1),
        (16, 2, {"jobs": 9}, 2, 8),
    ],
)
def test_runs_share_the_cores(
    cores: int, n_runs: int, settings: dict[str, int], jobs: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    seeds = {"seeds": f"0:{n_runs}"}
    resources = choose_resources(TrainConfig(env="recall", device="cpu", **seeds, **settings), n_runs)  # type: ignore[arg-type]
    assert (resources.jobs, resources.threads, resources.gpus) == (jobs, threads, [])
    assert resources.environment(0) == {"OMP_NUM_THREADS": str(threads)}


def test_each_gpu_trains_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(train, "check_device", lambda _: "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    resources = choose_resources(TrainConfig(env="recall", seeds="0:5"), 5)
    assert resources == Resources(2, 4, ["4", "6"])
    assert [resources.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["4", "6"]


def test_progress_is_read_from_whole_lines(tmp_path: Path) -> None:
    assert latest(tmp_path) == (0, "")
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 64, "rollout/ep_rew_mean": 0.25}\n{"step": 12')
    assert latest(tmp_path) == (64, "return 0.25")
    file.write_text('{"step": 64, "rollout/ep_rew_mean": null}\n')
    assert latest(tmp_path) == (64, "")


def test_each_seed_has_its_run_and_the_table_their_mean(group: tuple[Path, str]) -> None:
    path, out = group
    assert "seeds     3, 5; 2 at a time, " in out
    record = RunGroup.open(path).record
    assert record.seeds == [3, 5]
    values = []
    for seed in (3, 5):
        run = Run.open(path / f"seed_{seed}")
        assert run.config["train"]["seed"] == seed
        assert run.config["train"]["seeds"] is None
        last = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()][-1]
        values.append((last["rollout/ep_rew_mean"], last["eval_test/mean_reward"]))
        assert f"{seed}     256    {values[-1][0]:.2f}" in out
        assert str(run.path) in out
    assert not all(
        np.array_equal(array, weights(path / "seed_5")[name]) for name, array in weights(path / "seed_3").items()
    )
    (line,) = [line for line in out.splitlines() if line.startswith("mean ")]
    training, held_out = np.mean(values, 0)
    assert f"{training:.2f} [" in line
    assert f"{held_out:.2f} [" in line
    assert "95% t-interval over 2 seeds" in line


def test_a_group_stands_for_its_runs(group: tuple[Path, str], recall: Path) -> None:
    path = group[0]
    assert expand_groups([str(recall), str(path)]) == (str(recall), *(str(path / f"seed_{seed}") for seed in (3, 5)))
    for again in (path, f"{path}/", f"{path}/seed_3/", path / ".." / path.name / "seed_5"):
        with pytest.raises(UserError, match="is given twice"):
            expand_groups([str(path), str(again)])
    for again in (recall, f"{recall}/"):
        with pytest.raises(UserError, match="is given twice"):
            expand_groups([str(recall), str(again)])
    assert expand_groups([f"{path}/best"]) == tuple(str(path / f"seed_{seed}" / "best") for seed in (3, 5))


def test_eval_plays_each_run_of_a_group(call: Any, group: tuple[Path, str], tmp_path: Path) -> None:
    result = call("eval", group[0], "--train-levels", "none", "--freeze-edits", "--json", tmp_path / "eval.json")
    assert result.code == 0, result
    written = json.loads((tmp_path / "eval.json").read_text())
    assert [report["run"] for report in written["runs"]] == [f"{group[0]}/seed_{seed}" for seed in (3, 5)]
    means = {row["split"]: row for row in written["over_seeds"]}
    assert set(means) == {"held-out", "edits frozen, held-out"}
    expected = np.mean([report["rows"][0]["return"]["mean"] for report in written["runs"]])
    assert means["held-out"]["return"]["mean"] == pytest.approx(expected)
    assert "over seeds" in result.out
    # Were actions drawn alike for all seeds, their errors would not be independent.
    for i, seed in enumerate((3, 5)):
        argv = ("--train-levels", "none", "--seed", str(i), "--json", tmp_path / "one.json")
        assert call("eval", path := group[0] / f"seed_{seed}", *argv).code == 0, path
        alone = json.loads((tmp_path / "one.json").read_text())
        assert alone["episodes"] == written["runs"][i]["episodes"]


def test_compare_and_report_take_groups(call: Any, group: tuple[Path, str], recall: Path, tmp_path: Path) -> None:
    result = call("compare", group[0], recall, "--json", tmp_path / "compare.json")
    assert result.code == 0, result
    written = json.loads((tmp_path / "compare.json").read_text())
    assert (len(written["A"]["runs"]), len(written["B"]["runs"])) == (2, 1)
    assert "seed_3 is given twice" in call("compare", group[0], group[0] / "seed_3").error()
    pytest.importorskip("matplotlib", reason="pages are drawn with matplotlib")
    argv = ("--no-random", "--no-freeze", "--no-rank-heads", "-o", tmp_path / "page.html")
    assert call("report", group[0], *argv).code == 0
    assert "mean over 2 seeds with 95% t-interval" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("command", ["watch", "export"])
def test_other_commands_ask_for_one_run(command: str, call: Any, group: tuple[Path, str]) -> None:
    assert "is a group of runs; name one of them" in call(command, group[0]).error()


def test_a_finished_group_says_how_to_continue(call: Any, group: tuple[Path, str], snapshot: Any) -> None:
    before = snapshot(group[0])
    assert "have their steps already; give more with -n" in call("train", "--resume", group[0]).error()
    result = call("train", "--resume", group[0], "-n", 512, "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert "seed 3, 5; " in result.out
    assert "--verify is for one run" in call("train", "--resume", group[0], "-n", 512, "--verify").error()
    assert snapshot(group[0]) == before


def test_a_groups_file_starts_no_code_and_resumes_nothing_else(call: Any, tmp_path: Path) -> None:
    for command, part in (
        (["--env", "recall", "--core", "evil:Core"], "add --core evil:Core"),
        (["--env", "evil:Env-v0"], "add --env evil:Env-v0"),
        (["--resume", "elsewhere"], "its command resumes a run"),
    ):
        (tmp_path / "group.json").write_text(json.dumps({"seeds": [0], "command": command, "threads": 1}))
        assert part in call("train", "--resume", tmp_path).error()
    for text in ("{", '{"seeds": [], "command": [], "threads": 1}', '{"seeds": [0], "command": "x", "threads": 1}'):
        (tmp_path / "group.json").write_text(text)
        assert "group.json" in call("train", "--resume", tmp_path).error()


def test_a_stopped_group_is_saved_and_resumes_as_if_it_had_not_been(
    start: Any, call: Any, recall_argv: list[str], group: tuple[Path, str], tmp_path: Path
) -> None:
    argv = [*recall_argv, "--eval-freq", "128", "-f", tmp_path]
    process = start("train", *argv, "--seeds", "3,5", "--jobs", "1", "-n", 2_000_000)
    folder = tmp_path / "ppo_srwm" / "recall_1"
    metrics, end = folder / "seed_3" / "metrics.jsonl", time.monotonic() + 600  # a hang, not a loaded machine
    while not (metrics.exists() and metrics.read_text().count("\n") > 1) and time.monotonic() < end:
        time.sleep(0.1)  # a rollout's line is written before its update, and a run is saved after an update
    process.send_signal(signal.SIGINT)  # to this process alone, as a terminal does not
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert f"stopped by SIGINT. Resume with: srwm-rl train --resume {folder}" in err
    assert "(not finished)" in out
    assert not (folder / "seed_5").exists()
    steps = max(int(path.stem.rpartition("-")[2]) for path in Run.open(folder / "seed_3").files("checkpoint"))
    assert steps >= 64
    result = call("train", "--resume", folder, "-n", steps + 64, "--no-progress")
    assert result.code == 0, result
    assert [steps_of_model(folder / f"seed_{seed}") for seed in (3, 5)] == [steps + 64] * 2


def steps_of_model(run: Path) -> int:
    return int(Run.open(run).files("model")[-1].stem.rpartition("-")[2])


def test_a_failed_seed_does_not_stop_the_others(
    call: Any, recall_argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    env = "fragile:Fragile-v0"
    argv = [env if word == "recall" else word for word in recall_argv]
    result = call("train", *argv, "--seeds", "0:2", "-n", 128, "-f", "logs", "--jobs", 2)
    assert result.code == 1, result
    assert "seed 1 failed (exit code 3: stopped: " in result.err
    assert "seed 1 is unlucky" in result.err
    assert f"Resume with: srwm-rl train --resume logs/ppo_srwm/fragile+Fragile-v0_1 --env {env}" in result.err
    assert "of the one seed that finished" in result.out
    assert "[?" not in result.out
    assert steps_of_model(Path("logs/ppo_srwm/fragile+Fragile-v0_1/seed_0")) == 128


def test_a_log_has_a_line_where_a_run_ends_and_one_a_minute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 64, "rollout/ep_rew_mean": 0.25}\n')
    with SeedProgress([(3, tmp_path), (5, tmp_path / "none")], 128, shown=True) as progress:
        progress.update({3: RUNNING, 5: WAITING})
        progress.update({3: "failed", 5: RUNNING})
        assert capsys.readouterr().err == "seed 3: 64 of 128 steps, return 0.25, failed\n"
        monkeypatch.setattr("srwm_rl.scripts.seeds.progress.LINE_SECONDS", -1.0)
        progress.update({3: "failed", 5: RUNNING})
    assert capsys.readouterr().err == "seed 5: 0 of 128 steps\n"


def test_a_terminal_shows_a_bar_per_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 64, "rollout/ep_rew_mean": 0.25}\n')
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any stream for a terminal
    with SeedProgress([(3, tmp_path), (5, tmp_path / "none")], 128, shown=True) as progress:
        assert [task.completed for task in progress.bars.tasks] == [64, 0], "a resumed run begins where it was"
        progress.update({3: RUNNING, 5: WAITING})
        assert [task.fields["state"] for task in progress.bars.tasks] == ["return 0.25", "waiting"]
        assert progress.bars.tasks[0].time_remaining is None, "the steps of before count as speed"


def test_an_error_lets_running_seeds_save(tmp_path: Path) -> None:
    program = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\nprint(flush=True)"
    program += "\nwhile True: time.sleep(0.1)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    run = SeedRun(0, tmp_path, tmp_path / "log", [], process)
    with pytest.raises(RuntimeError, match="full"), _stopping([run]):
        raise RuntimeError("full")
    assert process.poll() == 7


def test_a_signal_while_a_seed_starts_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = popen(*arguments, **options)
        signal.raise_signal(signal.SIGTERM)
        return process

    popen = subprocess.Popen
    monkeypatch.setattr(train.subprocess, "Popen", start)
    monkeypatch.setattr(train, "_command", lambda _: [sys.executable, "-c", "import time; time.sleep(60)"])
    runs = [SeedRun(seed, tmp_path, tmp_path / "log", []) for seed in (0, 1)]
    with _stopping(runs) as signals, SeedProgress([(0, tmp_path), (1, tmp_path)], 1, shown=False) as progress:
        train._run_all(runs, Resources(jobs=1, threads=1), signals, progress)
    assert [run.code for run in runs] == [-signal.SIGTERM, None]


def test_a_group_of_which_every_seed_fails_keeps_their_output(
    call: Any, recall_argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hopeless.py").write_text(FRAGILE.replace('"seed_1" in', '"seed_" in').replace("Fragile-v0", "No-v0"))
    monkeypatch.chdir(tmp_path)
    argv = ["hopeless:No-v0" if word == "recall" else word for word in recall_argv]
    result = call("train", *argv, "--seeds", "0:2", "-n", 128, "-f", "logs")
    assert result.code == 1, result
    log = Path("logs/ppo_srwm/hopeless+No-v0_1/seed_0.log")
    assert f"its output is in {log}" in result.err
    assert "seed 1 is unlucky" in log.read_text()
    assert "Resume with: srwm-rl train --resume logs/ppo_srwm/hopeless+No-v0_1 --env hopeless:No-v0" in result.err
