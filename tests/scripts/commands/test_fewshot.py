"""`srwm-rl fewshot`: its options, exact resumes, what it refuses, and the published setting."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srwm_rl.scripts.commands.fewshot import FewShotConfig, train_argv
from srwm_rl.storage.run_folder import Run
from tests.scripts.commands.test_train import assert_same_end, metrics, updates, wait_until

CORE = (
    "--core-kwargs",
    "hidden_size:8",
    "--encoder-kwargs",
    'cnn:{"kind":"conv4","channels":[4,4],"standardize":true}',
)
TINY = ("--n-envs", "4", "--n-threads", "1", "--no-progress", *CORE)
STEPS = 4 * 22  # of one update: two examples of five classes, asked and told, and two queries


@pytest.fixture
def argv(few_shot_folder: Path) -> list[str]:
    """Return a command of a tiny run, with batch normalisation."""
    return ["fewshot", "--data", str(few_shot_folder), "--shots", "1:2", "--queries", "2", *TINY]


def test_a_run_is_recorded_as_what_train_would_have_made(call: Any, argv: list[str], tmp_path: Path) -> None:
    result = call(*argv, "-n", 2 * STEPS, "--save-freq", 1, "-f", tmp_path)
    assert result.code == 0, result
    assert "updates   2 of 4 environments x 22 steps, by right answers" in result.out
    run = tmp_path / "supervised_srwm" / "fewshot_1"
    config = Run.open(run).config["train"]
    assert config["algo"] == "supervised"
    assert config["env"] == "fewshot"
    assert config["core_kwargs"][:2] == ["hidden_size:8", "n_layers:1"]
    assert {"ways:5", "shots:1:2", "queries:2", "labels:ask"} < set(config["env_kwargs"])
    rows = metrics(run)
    assert len(rows) == 2
    for tag in ("rollout/accuracy", "train/loss", "train/cross_entropy", "train/prototype_loss", "train/grad_norm"):
        assert rows[1][tag] >= 0, tag  # the first row was written before the first update
    assert list(run.glob("**/events.out.tfevents*"))
    result = call("train", "--resume", run, "--verify")
    assert result.code == 0, result


def test_a_resumed_run_is_the_same_bit_by_bit(call: Any, argv: list[str], tmp_path: Path) -> None:
    more = ("--seed", "3", "--warmup-updates", "2", "--lr-decay", "none")
    assert call(*argv, *more, "-n", 4 * STEPS, "-f", tmp_path / "whole").code == 0
    assert call(*argv, *more, "-n", 2 * STEPS, "-f", tmp_path / "cut").code == 0
    cut = tmp_path / "cut" / "supervised_srwm" / "fewshot_1"
    result = call("fewshot", "--resume", cut, "-n", 4 * STEPS)
    assert result.code == 0, result
    assert_same_end(cut, tmp_path / "whole" / "supervised_srwm" / "fewshot_1")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_stopped_and_resumed_is_as_if_never_stopped(
    name: str, start: Callable[..., Any], call: Any, argv: list[str], tmp_path: Path
) -> None:
    process = start(*argv, "-n", 60 * STEPS, "-f", tmp_path / "cut")
    run = tmp_path / "cut" / "supervised_srwm" / "fewshot_1"
    wait_until(lambda: updates(run) >= 3, process)
    process.send_signal(signal.Signals[name])
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert f"stopped by {name}; saved at " in err
    assert updates(run) < 60
    assert call("train", "--resume", run, "--verbose", "0").code == 0
    assert call(*argv, "-n", 60 * STEPS, "-f", tmp_path / "whole", "--verbose", "0").code == 0
    assert_same_end(run, tmp_path / "whole" / "supervised_srwm" / "fewshot_1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--labels", "asked"), "--labels takes one of 'ask', 'sync', 'delayed', not 'asked'"),
        (("--preset", "fast"), "--preset takes one of 'quick', 'paper', not 'fast'"),
        (("--queries", "2.5"), "--queries takes a whole number, not '2.5'"),
        (("--ways", "5:x"), "ways must be a whole number above 0, or a range such as 1:5, not '5:x'"),
        (("--ways", "7"), "has 6 train classes; use at most as many ways, not 7"),
        (("--shots", "11"), "a train class of 12 images, fewer than shots + queries (13)"),
        (("--ways", "1"), "ways must be 2 or more"),
        (("--labels", "sync", "--queries", "0"), "labels 'sync' ask for queries alone"),
        (("--outputs", "3"), "outputs 3 are fewer than the 5 ways"),
        (("--data", "nowhere"), "there is no data 'nowhere': give glyphs, digits or a folder"),
        (("--data", "a,b,c"), "data must be glyphs, digits, a folder, or two of these"),
        (("--env", "recall"), "srwm-rl fewshot sets --env itself"),
        (("--env_kwargs", "ways:5"), "srwm-rl fewshot sets --env-kwargs itself"),
        (("--inputs", "action"), "the observation contains previous_action, which are right answers"),
        (("--gamma", "0.5"), "--gamma is a setting of ppo and impala, not of supervised"),
        (("--clip-range", "0.5"), "--clip-range is a setting of ppo, not of supervised"),
        (("--core", "lstn"), "did you mean 'lstm'"),
        (("--eval-levels", "5:10"), "overlap"),
        (("--eval-levels", "3000000:3000100"), "draw the same classes"),
        (("--preset", "paper", "--n-envs", "x"), "--n-envs takes a whole number, not 'x'"),
        (("--wayz", "5"), "unknown option '--wayz'"),
        (("more",), "unexpected argument 'more'"),
        (("--queries", "1", "--queries", "2"), "--queries is given twice"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_files(
    call: Any, argv: list[str], options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    words = ["fewshot", *options] + [w for i, w in enumerate(argv[1:], 1) if not {argv[i - 1], w} & {*options}]
    error = call(*words, "-n", STEPS, "-f", tmp_path).error()
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_few_shot_episodes_can_be_trained_by_reward(call: Any, argv: list[str], algo: str, tmp_path: Path) -> None:
    more = ("--algo", algo, "--batch-size", STEPS, "--aux-coef", "0")
    result = call(*argv, *more, "-n", STEPS, "-f", tmp_path)
    assert result.code == 0, result
    assert (tmp_path / f"{algo}_srwm" / "fewshot_1").is_dir()


def test_tasks_with_answers_are_trained_by_train(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    words = [word for i, word in enumerate(recall_argv) if "batch" not in recall_argv[i - 1] + word]
    words = [word for i, word in enumerate(words) if "epochs" not in words[i - 1] + word]
    assert call("train", *words, "--algo", "supervised", "-n", 128, "-f", tmp_path).code == 0
    run = tmp_path / "supervised_srwm" / "recall_1"
    assert "previous_action" not in str(Run.open(run).config)
    assert call("eval", run).code == 0
    error = call("train", "--env", "bandit", "--algo", "supervised", "-f", tmp_path).error()
    assert "these environments have no right answers to learn from: use a task that has, such as recall" in error


def test_the_paper_preset_is_the_published_setting(call: Any, tmp_path: Path) -> None:
    result = call("fewshot", "--preset", "paper", "--n-envs", "2", "--dry-run", "-f", tmp_path)
    assert result.code == 0, result
    assert "training fewshot for 3,600,000 steps: supervised, core srwm" in result.out  # 300,000 updates of 2 x 6
    assert "1,342,278 parameters" in result.out  # 1,342,021 published, and a value head of 257
    assert "Conv-4 64/64/64/64 in float32 + vectors as they are" in result.out
    assert result.out.startswith("paper: an update takes ")
    words = train_argv(FewShotConfig(ways="5", shots="1", queries=1, labels="sync", preset="paper"), [])
    text = " ".join(words)
    for setting in (
        "--n-envs 128",
        "--n-steps 6",
        "--n-timesteps 230400000",
        "--learning-rate 1e-3 --lr-decay none --max-grad-norm 1e9 --aux-coef 0 --beta2 0.995 --adam-eps 1e-9",
        "hidden_size:256 n_layers:2 n_heads:16 ff_size:1024 norm:residual query_init:1 identity_init:0",
    ):
        assert setting in text
    words = train_argv(FewShotConfig(preset="paper"), ["--core", "lstm", "--learning_rate", "3e-4"])
    assert "--core-kwargs" not in words
    assert "--learning-rate" not in words


def test_a_rollout_holds_the_longest_episode() -> None:
    def n_steps(**settings: Any) -> str:
        words = train_argv(FewShotConfig(**settings), [])
        return words[words.index("--n-steps") + 1]

    assert n_steps(ways="3:5", shots="1:4", queries=3) == str(5 * 4 * 2 + 3)
    assert n_steps(ways="5", shots="2", queries=3, labels="sync") == str(13)
    assert n_steps(ways="5", shots="2", queries=0, labels="delayed") == str(10)
    assert n_steps(data="glyphs,glyphs", ways="5", shots="2", queries=1, labels="delayed") == str(22)


def test_memory_layers_see_a_delayed_label_beside_its_image(call: Any, argv: list[str], tmp_path: Path) -> None:
    delayed = FewShotConfig(ways="5", labels="delayed")
    assert train_argv(delayed, ["--core", "delta"])[-4:] == ["--core-kwargs", "short_conv:2", "--core", "delta"]
    own = ["--core_kwargs", "hidden_size:8", "--seed", "3"]
    assert train_argv(delayed, own)[-5:] == ["--core_kwargs", "short_conv:2", "hidden_size:8", "--seed", "3"]
    for core_kwargs in (["--core-kwargs", "short_conv:4"], ["--core", "lstm"]):
        assert "short_conv:2" not in train_argv(delayed, core_kwargs)
    assert "short_conv:2" not in train_argv(FewShotConfig(ways="5"), [])
    assert "short_conv:2" not in train_argv(replace(delayed, preset="paper"), [])
    assert call(*argv, "--labels", "delayed", "-n", 10, "-f", tmp_path).code == 0
    config = Run.open(tmp_path / "supervised_srwm" / "fewshot_1").config["train"]
    assert {"short_conv:2", "hidden_size:8", "n_layers:1"} < set(config["core_kwargs"])


def test_help_names_the_options_of_train(call: Any) -> None:
    result = call("fewshot", "--help")
    assert result.code == 0
    assert "--shots" in result.out
    assert "All options of srwm-rl train" in result.out
