"""`srwm-rl import-official`: a checkpoint of the authors' code becomes a run for the other commands."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from srwm_rl.scripts.config.foreign_settings import read_settings
from tests.srwm_rl.hostile import official_checkpoints as official

TESTS = Path(__file__).parents[2]
GOLDEN = TESTS / "golden" / "full_srwm_model.tar"


FRUITBOT = {"multi_env": 1, "env": "procgen:procgen-fruitbot-v0", "num_levels": 2}


def evaluate(call: Any, run: Path, *argv: object) -> dict[str, Any]:
    file = run.parent / "report.json"
    result = call("eval", run, "-k", 1, "--json", file, *argv)
    assert (result.code, result.err) == (0, ""), result
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def test_the_summary_says_what_it_is_and_what_to_run_next(call: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = call("import-official", GOLDEN, "-o", run)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "imported SRWM (967,760 weights), of unknown age"
    assert "bigfish,fruitbot,maze,leaper,plunder,starpilot; mode easy" in lines[1]
    assert "0:200 for training, 1000:1200 held out" in lines[2]
    assert "does not name its games" in lines[3]
    assert lines[-1] == f"Now: srwm-rl eval {run} --protocol paper"
    assert read_settings(json.loads((run / "config.json").read_text())["train"], "a file").algo == "impala"
    assert call("import-official", GOLDEN, "-o", tmp_path / "quiet", "--verbose", 0).out == ""


@pytest.mark.parametrize("core", official.OPTIONS)
def test_every_kind_is_imported_and_evaluated(core: str, call: Any, tmp_path: Path) -> None:
    path = official.make_checkpoint(tmp_path / "model.tar", core, **FRUITBOT)
    result = call("import-official", path, "-o", tmp_path / "run")
    assert result.code == 0
    assert "trained for 1,600 steps" in result.out
    assert "note" not in result.out
    assert f"Now: srwm-rl eval {tmp_path / 'run'} --deterministic" in result.out  # its levels are not the paper's
    report = evaluate(call, tmp_path / "run", "--eval-levels", "1000:1002")
    assert (report["core"], report["env"], report["num_timesteps"]) == (core, "fruitbot", 1600)
    assert sorted(level for _, level, *_ in report["episodes"]["train"]) == [0, 1]
    assert sorted(level for _, level, *_ in report["episodes"]["held-out"]) == [1000, 1001]


def test_several_games_are_evaluated_without_further_options(call: Any, tmp_path: Path) -> None:
    path = official.make_checkpoint(tmp_path / "model.tar", multi_env=3)  # 3 games do not divide 64 environments
    assert call("import-official", path, "-o", tmp_path / "run").code == 0
    report = evaluate(call, tmp_path / "run", "--eval-levels", "1000:1001", "--train-levels", "none")
    assert [game for game, *_ in report["episodes"]["held-out"]] == ["bigfish", "fruitbot", "maze"]


def test_an_imported_run_cannot_be_resumed(call: Any, tmp_path: Path) -> None:
    path = official.make_checkpoint(tmp_path / "model.tar", **FRUITBOT)
    assert call("import-official", path, "-o", tmp_path / "run").code == 0
    message = call("train", "--resume", tmp_path / "run", "-n", 10_000, "--n-threads", 1, "--no-progress").error()
    assert "has no intact checkpoint to resume from; start a new run" in message


def test_wrong_input_is_refused_in_one_line(call: Any, tmp_path: Path) -> None:
    run, foreign = tmp_path / "run", tmp_path / "notes.txt"
    foreign.write_text("hello")
    assert "is no file of torch.save" in call("import-official", foreign, "-o", run).error()
    assert "cannot read" in call("import-official", tmp_path / "x", "-o", run).error()
    assert "-o RUN" in call("import-official", GOLDEN).error()
    assert "Their checkpoint" in call("import-official", "-o", run).error()
    assert "exists already" in call("import-official", GOLDEN, "-o", tmp_path).error()
    foreign_weights = official.save(tmp_path / "other.tar", {"fc.weight": official.torch.ones(2, 2)}, None)
    assert "weight 'feat_convs.0.0.weight' is missing" in call("import-official", foreign_weights, "-o", run).error()
    assert "did you mean 'import-official'" in call("import_oficial").error()
    assert not run.exists()


def test_the_help_is_light_and_explains() -> None:
    code = (
        "import sys\n"
        "from srwm_rl.scripts.main import main\n"
        "try:\n"
        "    main(['import-official', '--help'])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    for part in ("usage: srwm-rl import-official", "model.tar", "-o", "nothing in it is run", "SR-Delta"):
        assert part in result.stdout
