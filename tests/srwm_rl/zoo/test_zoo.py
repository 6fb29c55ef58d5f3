"""The bundled agents: each loads, acts as its card says, and all are small and part of the package."""

import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from srwm_rl import UserError, load
from srwm_rl.envs.make import resolve
from srwm_rl.scripts.config.foreign_settings import read_settings
from srwm_rl.scripts.evaluation.card import shareable
from srwm_rl.scripts.evaluation.protocol import EvalConfig
from srwm_rl.scripts.evaluation.runner import evaluate
from srwm_rl.scripts.main import main
from srwm_rl.zoo import DEMO, FOLDER, zoo_file, zoo_names

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings this
    import tomli as tomllib

MAX_BYTES = 5_000_000
ROOT = Path(__file__).parents[3]


def test_the_agents_that_the_demo_and_the_documentation_name_are_there() -> None:
    assert {"bandit", DEMO, f"{DEMO}_feedforward", "parity", "recall", "starpilot"} <= set(zoo_names())


def test_all_together_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < MAX_BYTES


@pytest.mark.parametrize("name", zoo_names())
def test_an_agents_score_lies_in_its_cards_interval(name: str) -> None:
    card = load(f"zoo:{name}").card
    assert card is not None
    score = card.headline()
    n_levels = 100 if resolve(card.task).kind == "procgen" else 300
    start = int(score.levels.partition(":")[0])
    levels = f"{start}:{start + n_levels}"
    config = EvalConfig(run=f"zoo:{name}", train_levels="none", eval_levels=(levels,), progress=False)
    row = evaluate(config)["rows"][0]["return"]
    # Two intervals that hold the same mean overlap.
    assert row["low"] <= score.returns.high, (row, score)
    assert score.returns.low <= row["high"], (row, score)


@pytest.mark.parametrize("name", zoo_names())
def test_an_agent_is_above_chance_and_the_best_constant_action_and_holds_no_private_setting(name: str) -> None:
    agent = load(f"zoo:{name}")
    card = agent.card
    assert card is not None
    scores = {score.player: score.returns for score in card.scores}
    bar = max(scores[player].high or 0 for player in ("random play", "best constant action"))
    assert (scores["agent"].low or 0) > bar
    assert ("edits frozen" in scores) == (agent.policy.core_name != "feedforward")
    trained = read_settings(agent.config, name)
    assert trained == shareable(trained)
    assert card.command.startswith(f"srwm-rl train --env {card.task}") or "--preset" in card.command


def test_names_are_taken_with_and_without_the_prefix_and_misspelt_ones_are_corrected() -> None:
    assert zoo_file("zoo:recall") == zoo_file("recall")
    assert load(zoo_file("recall")).card == load("zoo:recall").card
    with pytest.raises(UserError, match="'rekall'; did you mean 'recall'"):
        load("zoo:rekall")
    with pytest.raises(UserError, match="no agent of the zoo"):
        load(f"zoo:../{Path(__file__).name}")


@pytest.mark.slow
def test_the_command_of_a_card_trains_an_agent_whose_score_lies_in_its_interval(tmp_path: Path) -> None:
    card = load("zoo:parity").card
    assert card is not None
    assert main([*shlex.split(card.command)[1:], "--verbose", "0", "--no-progress", "-f", str(tmp_path)]) == 0
    (run,) = tmp_path.glob("*/*")
    row = evaluate(EvalConfig(run=str(run), train_levels="none", progress=False))["rows"][0]["return"]
    score = card.headline().returns
    # Other processors round otherwise: not the same agent, and one that is as good.
    assert row["high"] >= (score.low or 0) - 0.05, (row, score)


def test_the_packages_metadata_name_every_agent() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "srwm_rl.zoo" in tool["packages"]
    (pattern,) = tool["package-data"]["srwm_rl.zoo"]
    assert sorted(path.stem for path in FOLDER.glob(pattern)) == zoo_names()


@pytest.mark.slow
def test_a_wheel_holds_every_agent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("srwm_rl/zoo/")}
    assert names == {path.name for path in FOLDER.iterdir() if path.is_file()}
