"""`srwm-rl eval`: every level exactly k times, tables that agree with the episodes, overlaps refused."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl.agents.evaluation.baselines import ConstantAgent
from srwm_rl.agents.evaluation.play_levels import play_levels
from srwm_rl.envs import make_levels_env
from srwm_rl.envs.procgen.games import ACTIONS
from srwm_rl.envs.tasks import TASKS
from srwm_rl.scripts.config.foreign_settings import read_settings
from srwm_rl.scripts.evaluation.results import pool, read_evaluation
from srwm_rl.scripts.main import main
from srwm_rl.storage.run_folder import Run


@pytest.fixture(scope="session")
def two_games(tmp_path_factory: pytest.TempPathFactory, procgen_argv: list[str]) -> Path:
    """Return a run on two games whose episodes are short."""
    logs = tmp_path_factory.mktemp("games")
    argv = ["train", "--env", "fruitbot,starpilot", *procgen_argv, "-n", "64", "--verbose", "0", "-f", str(logs)]
    assert main(argv) == 0
    return logs / "ppo_srwm" / "fruitbot+starpilot_1"


def report(call: Any, tmp_path: Path, *argv: object) -> dict[str, Any]:
    file = tmp_path / "report.json"
    output = call("eval", *argv, "--json", file)
    assert output.code == 0, output
    assert output.err == ""
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def played(result: dict[str, Any], split: str) -> Counter[tuple[str, int]]:
    return Counter((game, level) for game, level, *_ in result["episodes"][split])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n_envs", [1, 5, 64])
def test_every_level_is_played_exactly_k_times(call: Any, recall: Path, tmp_path: Path, k: int, n_envs: int) -> None:
    result = report(call, tmp_path, recall, "-k", k, "--n-envs", n_envs, "--random")
    assert played(result, "train") == Counter({("recall", level): k for level in range(12)})
    held_out = Counter({("recall", level): k for level in range(100, 108)})
    assert played(result, "held-out") == held_out
    assert played(result, "random, held-out") == held_out
    assert result["repeats"] == k


def test_rows_summarise_the_episodes(call: Any, recall: Path, tmp_path: Path) -> None:
    result = report(call, tmp_path, recall, "-k", 2, "--random")
    assert [row["split"] for row in result["rows"]] == ["train", "held-out", "random, held-out"]
    for row in result["rows"]:
        returns = [episode[2] for episode in result["episodes"][row["split"]]]
        lengths = [episode[3] for episode in result["episodes"][row["split"]]]
        solved = [episode[4] for episode in result["episodes"][row["split"]]]
        assert row["levels"] == len(returns) / 2
        assert row["return"]["mean"] == pytest.approx(np.mean(returns))
        assert row["solved"]["mean"] == pytest.approx(np.mean(solved))
        assert row["length"] == pytest.approx(np.mean(lengths))
        for value in (row["return"], row["solved"]):
            assert value["low"] <= value["mean"] <= value["high"]
        assert any(row["return"]["low"] < row["return"]["high"] for row in result["rows"])
    (gap,) = result["generalization_gap"]
    train, held_out = (row["return"]["mean"] for row in result["rows"][:2])
    assert gap["mean"] == pytest.approx(train - held_out)
    assert gap["low"] <= gap["mean"] <= gap["high"]


def test_deterministic_evaluation_repeats_itself(call: Any, recall: Path, tmp_path: Path) -> None:
    first = report(call, tmp_path, recall, "--deterministic", "-k", 2)
    assert first["actions"] == "deterministic"
    assert report(call, tmp_path, recall, "--deterministic", "-k", 2, "--seed", 0) == first


def test_sampled_evaluation_depends_on_the_seed_alone(call: Any, recall: Path, tmp_path: Path) -> None:
    first = report(call, tmp_path, recall, "-k", 4, "--seed", 1)
    assert first["actions"] == "stochastic"
    assert report(call, tmp_path, recall, "-k", 4, "--seed", 1) == first
    assert report(call, tmp_path, recall, "-k", 4, "--seed", 2)["episodes"] != first["episodes"]


def test_the_table(call: Any, recall: Path) -> None:
    output = call("eval", recall, "--random")
    assert output.code == 0
    for part in ("core srwm, 256 steps", "train 0:12", "held-out 100:108", "random, held-out", "generalisation gap"):
        assert part in output.out
    assert "INVALID" not in output.out


def test_other_splits(call: Any, recall: Path, tmp_path: Path) -> None:
    argv = ("--eval-levels", "200:203", "--eval-levels", "300:305", "--train-levels", "2:6")
    result = report(call, tmp_path, recall, *argv)
    assert played(result, "train") == Counter({("recall", level): 1 for level in range(2, 6)})
    assert played(result, "held-out 200:203") == Counter({("recall", level): 1 for level in range(200, 203)})
    assert played(result, "held-out 300:305") == Counter({("recall", level): 1 for level in range(300, 305)})
    assert [gap["split"] for gap in result["generalization_gap"]] == ["held-out 200:203", "held-out 300:305"]
    assert report(call, tmp_path, recall, "--train-levels", "none")["episodes"].keys() == {"held-out"}


def test_a_single_level_has_no_interval(call: Any, recall: Path, tmp_path: Path) -> None:
    result = report(call, tmp_path, recall, "--eval-levels", "200:201", "--train-levels", "none")
    assert result["rows"][0]["return"]["low"] is None
    assert result["rows"][0]["levels"] == 1


def test_several_games_have_a_row_each_and_one_together(call: Any, two_games: Path, tmp_path: Path) -> None:
    argv = ("--eval-levels", "1000:1002", "--train-levels", "none", "--n-envs", 4, "--random")
    result = report(call, tmp_path, two_games, *argv)
    games = ("fruitbot", "starpilot")
    once = Counter({(game, level): 1 for game in games for level in (1000, 1001)})
    for split in ("held-out", "random, held-out"):
        assert played(result, split) == once
        rows = [row for row in result["rows"] if row["split"] == split]
        assert [row["game"] for row in rows] == ["all games", *games]
        assert [row["levels"] for row in rows] == [4, 2, 2]
        assert rows[0]["return"]["mean"] == pytest.approx(np.mean([row["return"]["mean"] for row in rows[1:]]))
        assert rows[0]["normalized"] == pytest.approx(np.mean([row["normalized"] for row in rows[1:]]))
        for row, (low, high) in zip(rows[1:], ((-1.5, 32.4), (2.5, 64.0)), strict=True):  # the published easy ranges
            assert row["normalized"] == pytest.approx((row["return"]["mean"] - low) / (high - low))
    assert result["mode"] == "easy"


def test_overlap_is_refused_unless_allowed(call: Any, recall: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    argv = ("eval", recall, "--eval-levels", "10:14", "--json", file)
    assert "levels 10:14 were trained on (0:12): 2 of 4" in call(*argv).error()
    assert not file.exists()
    output = call(*argv, "--allow-overlap")
    assert output.code == 0
    assert "INVALID as a held-out score: 2 of the levels were trained on" in output.out
    assert json.loads(file.read_text())["overlap"] == 2
    assert "INVALID" not in call("eval", recall, "--allow-overlap").out  # no overlap


REFUSED = [
    (["--eval-levels", "200:203", "--eval-levels", "202:205"], "overlap in 1 levels"),
    (["--eval-levels", "200:203", "--eval-levels", "200:203", "--allow-overlap"], "overlap in 3 levels"),
    (["--train-levels", "100:108"], "were not all trained on (0:12)"),
    (["--train-levels", "all"], "were not all trained on (0:12)"),
    (["--eval-levels", "200:2000000000"], "too many to list"),
    (["--eval-levels", "9:3"], "hold no level"),
    (["--eval-levels", "x"], "not of the form 'start:stop'"),
    (["--protocol", "paper", "-k", "3"], "--protocol paper decides --repeats"),
    (["--protocol", "paper"], "--train-levels 0:200 were not all trained on (0:12)"),
    (["--protocol", "papr"], "--protocol takes"),
    (["--core", "there_is_none:Core"], "there is no module 'there_is_none'"),
    (["-k", "0"], "--repeats must be at least 1, not 0"),
    (["-k", "-1"], "--repeats must be at least 1, not -1"),
    (["--n-envs", "0"], "--n-envs must be at least 1, not 0"),
    (["--seed", "-1"], "--seed must lie in"),
    (["--seed", "99999999999"], "--seed must lie in"),
    (["--device", "gpu"], "there is no device 'gpu'"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--determinstic"], "did you mean '--deterministic'?"),
    (["--json"], "--json needs a value"),
    (["extra"], "unexpected argument 'extra'"),
]


@pytest.mark.parametrize(("argv", "part"), REFUSED)
def test_wrong_input_is_refused_in_one_line(argv: list[str], part: str, call: Any, recall: Path) -> None:
    output = call("eval", recall, *argv)
    assert part in output.error()
    assert output.out == ""


def test_a_report_that_cannot_be_written_is_refused_before_playing(call: Any, recall: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere" / "x.json", tmp_path, ""):
        output = call("eval", recall, "--json", path)
        assert "cannot write" in output.error()
        assert output.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_missing_run_is_refused(call: Any) -> None:
    assert "A run folder, a group of runs, or a model file" in call("eval").error()


def test_environments_must_fit_the_games(call: Any, two_games: Path) -> None:
    assert "must be a multiple of the 2 games" in call("eval", two_games, "--n-envs", 3).error()


def test_a_model_file_is_enough(call: Any, recall: Path, tmp_path: Path) -> None:
    file = shutil.copy(Run.open(recall).files("model")[-1], tmp_path / "agent.safetensors")
    alone = report(call, tmp_path, file)
    assert alone["episodes"] == report(call, tmp_path, recall)["episodes"]


def test_a_checkpoint_file_is_refused(call: Any, recall: Path) -> None:
    message = call("eval", Run.open(recall).files("checkpoint")[-1]).error()
    assert "is a checkpoint file, not a model; give the run folder or a model file" in message


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_model_is_refused(damage: str, call: Any, recall: Path, tmp_path: Path) -> None:
    content = Run.open(recall).files("model")[-1].read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    file = tmp_path / "agent.safetensors"
    file.write_bytes({"truncated": content[:middle], "empty": b"", "flipped": flipped}[damage])
    assert f"{file} is" in (message := call("eval", file).error())
    assert "damaged" in message


def test_a_run_without_a_model_is_refused(call: Any, recall: Path, tmp_path: Path) -> None:
    run = shutil.copytree(recall, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert "has no model: it was stopped before its first checkpoint" in call("eval", run).error()


def test_evaluating_changes_nothing_in_the_run(call: Any, recall: Path, snapshot: Any) -> None:
    before = snapshot(recall)
    assert call("eval", recall).code == 0
    assert snapshot(recall) == before


def test_the_papers_protocol(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    argv = ["0:300" if word == "0:12" else "2000:2008" if word == "100:108" else word for word in recall_argv]
    assert call("train", *argv, "-n", 64, "-f", tmp_path, "--verbose", 0).code == 0
    run = tmp_path / "ppo_srwm" / "recall_1"
    result = report(call, tmp_path, run, "--protocol", "paper")
    assert result["actions"] == "deterministic"
    starts = {"train": 0, "held-out 1000:1200": 1000, "held-out 1200:1400": 1200, "held-out 1400:1600": 1400}
    assert result["levels"].keys() == starts.keys()
    for split, start in starts.items():
        assert played(result, split) == Counter({("recall", level): 1 for level in range(start, start + 200)})


def test_frozen_edits_are_compared_level_by_level(call: Any, recall: Path, tmp_path: Path) -> None:
    argv = ("--freeze-edits", "--lesion", "0.0", "--lesion", "0.1", "--undo", "key,y", "--undo", "beta", "-k", 2)
    result = report(call, tmp_path, recall, *argv)
    plain = report(call, tmp_path, recall, "-k", 2)
    assert {key: value for key, value in result.items() if key != "interventions"} == plain
    names = ["edits frozen", "no edits in head 0.0", "no edits in head 0.1"]
    names += ["edits of y, key undone", "edits of beta undone"]
    assert [intervention["name"] for intervention in result["interventions"]] == names
    for intervention in result["interventions"]:
        assert [row["split"] for row in intervention["rows"]] == [
            f"{intervention['name']}, {split}" for split in ("train", "held-out")
        ]
        for row in intervention["differences"]:
            live, held = ({} for _ in range(2))  # type: ignore[var-annotated]
            for into, episodes in ((live, result["episodes"]), (held, intervention["episodes"])):
                for _, level, value, *_ in episodes[row["split"]]:
                    into.setdefault(level, []).append(value)
            assert live.keys() == held.keys()
            pairs = np.array([np.mean(live[level]) - np.mean(held[level]) for level in sorted(live)])
            assert row["return"]["mean"] == pytest.approx(pairs.mean())
            assert row["return"]["low"] <= row["return"]["mean"] <= row["return"]["high"]
            assert row["levels"] == len(pairs)
            assert row["solved"]["mean"] == pytest.approx(pairs.mean())  # recall pays 1 for a right answer
    assert report(call, tmp_path, recall, *argv) == result


def test_what_is_frozen_in_an_lstm_is_not_called_edits(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    short = [word for word in recall_argv if word not in ("--core-kwargs", "hidden_size:16", "n_layers:1")]
    assert call("train", *short, "--core", "lstm", "-n", "128", "-f", tmp_path).code == 0
    run = tmp_path / "ppo_lstm" / "recall_1"
    result = report(call, tmp_path, run, "--freeze-edits", "--lesion", "0.0")
    assert [part["name"] for part in result["interventions"]] == ["memory frozen", "no memory in head 0.0"]
    pytest.importorskip("matplotlib", reason="pages are drawn with matplotlib")
    page = tmp_path / "page.html"
    assert call("report", run, "--eval", tmp_path / "report.json", "--no-rank-heads", "-o", page).code == 0
    text = page.read_text()
    assert "--freeze-edits=0 --lesion=0.0" in text
    assert " live, " in text
    assert "frozen</small>" in text


def test_the_table_shows_both_and_the_difference(call: Any, recall: Path) -> None:
    output = call("eval", recall, "--freeze-edits=after=3", "--train-levels", "none")
    lines = [line for line in output.out.splitlines() if line]
    assert any(line.startswith("held-out 100:108 ") for line in lines)
    assert any(line.startswith("edits frozen from step 3 on, held-out 100:108 ") for line in lines)
    assert "as it is minus edits frozen from step 3 on (held-out; paired, 8 levels): return " in lines[-1]
    assert ", solved " in lines[-1]


@pytest.mark.parametrize("argv", [["--freeze-edits=2"], ["--freeze-edits", "2"], ["--freeze-edits", "after=2"]])
def test_spellings_of_the_step(argv: list[str], call: Any, recall: Path, tmp_path: Path) -> None:
    (only,) = report(call, tmp_path, *argv, recall, "--train-levels", "none")["interventions"]
    assert only["name"] == "edits frozen from step 2 on"


def test_a_run_may_follow_the_option_without_a_value(call: Any, recall: Path, tmp_path: Path) -> None:
    (only,) = report(call, tmp_path, "--freeze-edits", recall, "--train-levels", "none")["interventions"]
    assert only["name"] == "edits frozen"


def test_several_games_have_a_difference_each(call: Any, two_games: Path, tmp_path: Path) -> None:
    argv = ("--eval-levels", "1000:1002", "--train-levels", "none", "--n-envs", 4, "--freeze-edits")
    (only,) = report(call, tmp_path, two_games, *argv)["interventions"]
    assert [row["game"] for row in only["differences"]] == ["all games", "fruitbot", "starpilot"]
    means = [row["return"]["mean"] for row in only["differences"]]
    assert means[0] == pytest.approx((means[1] + means[2]) / 2)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--freeze-edits=x"], "--freeze-edits takes a whole number, not 'x'"),
        (["--freeze-edits=-1"], "--freeze-edits must be at least 0, not -1"),
        (["--freeze-edits", "--freeze-edits"], "--freeze-edits is given twice"),
        (["--lesion", "3"], "--lesion takes layer.head, such as 0.3, not '3'"),
        (["--lesion", "a.b"], "--lesion takes layer.head"),
        (["--lesion", "0.-1"], "--lesion takes layer.head"),
        (["--lesion", "1.0"], "there is no head 1.0: core 'srwm' has layers 0 to 0 with heads 0 to 1"),
        (["--lesion", "0.8"], "there is no head 0.8"),
        (["--undo", "qery"], "--undo: there is no group of columns 'qery'; did you mean 'query'?"),
        (["--undo", "query,"], "--undo: there is no group of columns ''"),
        (["--undo"], "--undo needs a value"),
    ],
)
def test_wrong_interventions_are_refused_before_playing(argv: list[str], part: str, call: Any, recall: Path) -> None:
    output = call("eval", recall, *argv)
    assert part in output.error()
    assert output.out == ""


def test_a_core_without_memory_has_nothing_to_freeze(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    argv = ["--core", "feedforward", "-n", 64, "-f", tmp_path, "--verbose", 0]
    assert call("train", *recall_argv, *argv).code == 0
    run = tmp_path / "ppo_feedforward" / "recall_1"
    assert "core 'feedforward' carries nothing from step to step" in call("eval", run, "--freeze-edits").error()
    assert "core 'feedforward' carries nothing" in call("eval", run, "--lesion", "0.0").error()
    assert "--undo: core 'feedforward' carries no edits of y" in call("eval", run, "--undo", "query").error()


def test_env_kwargs_change_the_evaluations_environment(call: Any, recall: Path, tmp_path: Path) -> None:
    longer = report(call, tmp_path, recall, "--env-kwargs", "delay:30")
    assert min(episode[3] for episode in longer["episodes"]["train"]) >= 17  # half the delay, the cue and the question
    assert "has no setting 'dealy'" in call("eval", recall, "--env-kwargs", "dealy:30").error()


def test_levels_that_look_like_training_levels_are_counted(call: Any, procgen_argv: list[str], tmp_path: Path) -> None:
    argv = ["train", "--env", "maze", *procgen_argv, "--levels", "0:200", "--eval-levels", "1005:1011", "-n", 64]
    assert call(*argv, "-f", tmp_path, "--verbose", 0).code == 0
    run = tmp_path / "ppo_srwm" / "maze_1"
    result = report(call, tmp_path, run, "--train-levels", "none")
    assert result["same_first_frame"] == {"held-out": {"maze": [1008, 1010]}}
    output = call("eval", run, "--train-levels", "none")
    assert "2 level(s) of maze, held-out, begin with a frame that begins a training level too" in output.out


def constant_returns(env: str, action: int, levels: range, **settings: Any) -> np.ndarray:
    batch = make_levels_env(env, len(levels), levels, 1, 0, **settings)
    try:
        return play_levels(ConstantAgent(action), batch).level_means()
    finally:
        batch.close()


def test_the_best_constant_action_is_chosen_on_training_levels_and_played_on_held_out_ones(
    call: Any, recall: Path, tmp_path: Path
) -> None:
    result = report(call, tmp_path, recall, "--baselines", "-k", 2)
    (constant,) = result["baselines"]
    means = [constant_returns("recall", action, range(12)).mean() for action in range(4)]
    best = int(np.argmax(means))
    assert constant["name"] == "best constant action"
    assert constant["action"] == {"recall": str(best)}
    assert constant["tried"] == "each action (4)"
    assert constant["chosen_on"] == "12 of the training levels 0:12"
    assert played(constant, "held-out") == Counter({("recall", level): 2 for level in range(100, 108)})
    expected = constant_returns("recall", best, range(100, 108))
    (row,) = constant["rows"]
    assert row["split"] == "best constant action, held-out"
    assert row["return"]["mean"] == pytest.approx(expected.mean())
    (difference,) = constant["differences"]
    assert difference["return"]["mean"] == pytest.approx(result["rows"][1]["return"]["mean"] - expected.mean())
    random = report(call, tmp_path, recall, "--random", "-k", 2)
    assert {**result, "baselines": None, "not_above": None} == {**random, "baselines": None, "not_above": None}


def test_an_agent_that_is_not_above_a_baseline_is_told_so(call: Any, recall: Path, tmp_path: Path) -> None:
    """An agent of 256 steps is not above; the same episodes with a higher return are."""
    result = report(call, tmp_path, recall, "--baselines")
    assert [row["baseline"] for row in result["not_above"]] == ["random play", "best constant action"]
    output = call("eval", recall, "--baselines").out
    lines = [line for line in output.splitlines() if line.startswith("NOT ABOVE")]
    assert [line.partition(": ")[0] for line in lines] == [
        f"NOT ABOVE {name} (held-out; paired, 8 levels)" for name in ("random play", "best constant action")
    ]
    trained = read_settings(json.loads((recall / "config.json").read_text())["train"], "config.json")
    file = tmp_path / "better.json"
    better = [[game, level, 3.0 + level % 2, *rest] for game, level, _, *rest in result["episodes"]["held-out"]]
    file.write_text(json.dumps(result | {"episodes": result["episodes"] | {"held-out": better}}))
    pooled = pool([read_evaluation(str(file), trained)], trained, seed=0)
    assert pooled["not_above"] == []
    assert pooled["baselines"][0]["differences"][0]["return"]["low"] > 1


def test_reference_policies_have_a_row_each(call: Any, recall_argv: list[str], tmp_path: Path) -> None:
    argv = ["bandit" if word == "recall" else word for word in recall_argv]
    assert call("train", *argv, "-n", 64, "-f", tmp_path, "--verbose", 0).code == 0
    run = tmp_path / "ppo_srwm" / "bandit_1"
    result = report(call, tmp_path, run, "--baselines", "--env-kwargs", "n_pulls:5")
    references = TASKS["bandit"].reference_returns(range(100, 108), n_pulls=5)
    assert references
    assert [part["name"] for part in result["baselines"]] == ["best constant action", *references]
    for part in result["baselines"][1:]:
        assert part["rows"][0]["return"]["mean"] == pytest.approx(np.mean(references[part["name"]]))
        (difference,) = part["differences"]
        assert difference["return"]["mean"] == pytest.approx(
            result["rows"][1]["return"]["mean"] - np.mean(references[part["name"]])
        )
    line = next(line for line in call("eval", run, "--baselines").out.splitlines() if line.startswith("Bayes-optimal"))
    assert line.split()[-1] == "-"  # no length: nothing was played


def test_every_game_has_a_constant_action_of_its_own(call: Any, two_games: Path, tmp_path: Path) -> None:
    argv = ("--eval-levels", "1000:1002", "--train-levels", "none", "--n-envs", 4, "--baselines")
    result = report(call, tmp_path, two_games, *argv)
    (constant,) = result["baselines"]
    assert [row["game"] for row in constant["rows"]] == ["all games", "fruitbot", "starpilot"]
    for game, text in constant["action"].items():
        number, _, name = text.partition(" ")
        assert name == f"({ACTIONS[int(number)]})"
        returns = [row[2] for row in constant["episodes"]["held-out"] if row[0] == game]
        assert returns == pytest.approx(constant_returns(game, int(number), range(1000, 1002)).tolist())


def test_a_choice_without_other_levels_uses_those_that_are_played(call: Any, recall: Path, tmp_path: Path) -> None:
    argv = ("--baselines", "--allow-overlap", "--train-levels", "none", "--eval-levels")
    assert report(call, tmp_path, recall, *argv, "0:8")["baselines"][0]["chosen_on"].startswith("4 of ")
    assert report(call, tmp_path, recall, *argv, "0:12")["baselines"][0]["chosen_on"].startswith("12 of ")


def test_another_agent_is_played_beside_on_the_same_levels(call: Any, tmp_path: Path) -> None:
    other, levels = "zoo:hidden_controls_feedforward", ("--eval-levels", "2000000:2000020", "--train-levels", "none")
    result = report(call, tmp_path, "zoo:hidden_controls", "--beside", other, *levels)
    (part,) = result["baselines"]
    assert part["name"] == part["agent"] == other
    alone = report(call, tmp_path, other, *levels)
    assert part["episodes"] == alone["episodes"]
    assert part["return_by_attempt"][0]["return"] == alone["return_by_attempt"][0]["return"]
    (difference,) = part["differences"]
    means = [of["rows"][0]["return"]["mean"] for of in (result, alone)]
    assert difference["return"]["mean"] == pytest.approx(means[0] - means[1])
    line = next(
        line
        for line in call("eval", "zoo:hidden_controls", "--beside", other, *levels).out.splitlines()
        if other in line
    )
    assert line.startswith(f"{other}, held-out 2000000:2000020 ")


def test_agents_that_cannot_be_played_beside_are_refused(call: Any, recall: Path, tmp_path: Path) -> None:
    assert "differ in environment" in call("eval", "zoo:hidden_controls", "--beside", "zoo:recall").error()
    levels = ("--env", "hidden_controls", "--levels", "1000000:1000010", "--eval-levels", "5:9", "--n-envs", 2)
    small = ("--n-steps", 8, "--batch-size", 8, "-n", 16, "--n-epochs", 1, "--verbose", 0, "-f", tmp_path)
    assert call("train", *levels, *small).code == 0
    run = tmp_path / "ppo_srwm" / "hidden_controls_1"
    assert "was trained on 10 of the held-out levels" in call("eval", "zoo:hidden_controls", "--beside", run).error()
