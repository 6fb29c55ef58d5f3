"""Few-shot evaluations: accuracies counted by hand, intervals over episodes and over runs, settings, tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl.agents.evaluation.baselines import ConstantAgent
from srwm_rl.agents.evaluation.play_levels import Episodes, play_levels
from srwm_rl.envs import make_levels_env
from srwm_rl.envs.tasks.fewshot import FewShotBatch
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.few_shot import few_shot_rows, grid, over_runs, with_outputs
from srwm_rl.scripts.evaluation.few_shot_tables import few_shot_tables, percent

LEVELS = range(2_000_000, 2_000_040)


def settings_of(folder: Path, **kwargs: object) -> TrainConfig:
    kwargs = {"data": folder, "ways": 3, "shots": 2, **kwargs}
    return TrainConfig(env="fewshot", algo="supervised", env_kwargs=tuple(f"{k}:{v}" for k, v in kwargs.items()))


def play(agent: Any, trained: TrainConfig, repeats: int = 1) -> dict[str, Episodes]:
    env_kwargs = pairs(trained.env_kwargs, "env_kwargs")
    env = make_levels_env("fewshot", 7, list(LEVELS), repeats, 0, env_kwargs=env_kwargs, inputs=())
    return {"held-out": play_levels(agent, env)}


def counted(trained: TrainConfig, action: int) -> list[list[dict[str, Any]]]:
    """Return for each level every question, with whether a constant action is right, by stepping single episodes."""
    env = FewShotBatch(1, **pairs(trained.env_kwargs, "env_kwargs"))
    episodes = []
    for level in LEVELS:
        env.reset(levels=[level])
        questions: list[dict[str, Any]] = []
        while True:
            about, answer = {key: value[0] for key, value in env.asked_about().items()}, env.answers()[0]
            if answer >= 0:
                questions.append({**about, "right": answer == action})
            if env.step(np.array([action])).terminated[0]:
                break
        episodes.append(questions)
    return episodes


def interval(episodes: list[list[dict[str, Any]]], **where: object) -> dict[str, float]:
    """Return the mean over episodes with its 95% interval, 1.96 std / sqrt(n), of the questions with these values."""
    chosen = [[q["right"] for q in of if all(q[key] == value for key, value in where.items())] for of in episodes]
    means = np.array([np.mean(of) for of in chosen if of])
    half = 1.96 * means.std(ddof=1) / np.sqrt(len(means))
    return {"mean": means.mean(), "low": max(means.mean() - half, 0), "high": min(means.mean() + half, 1)}


@pytest.mark.parametrize("labels", ["ask", "sync", "delayed"])
def test_accuracies_are_those_counted_by_hand(few_shot_folder: Path, labels: str) -> None:
    trained = settings_of(few_shot_folder, labels=labels, queries=2, shots="1:3")
    rows = few_shot_rows(trained, {"always 1": play(ConstantAgent(1), trained)})
    row, episodes = rows[0], counted(trained, 1)
    assert [row["name"] for row in rows] == ["always 1", "chance", "labels alone", "nearest pixels", "blurred cosine"]
    assert (row["ways"], row["shots"], row["part"], row["episodes"]) == ("3", "1:3", 0, len(LEVELS))
    assert row["queries"] == pytest.approx(interval(episodes, query=True))
    for seen, value in enumerate(row["by_seen"]):
        if labels == "sync" and seen == 0:
            assert value is None
        else:
            assert value == pytest.approx(interval(episodes, seen=seen))
    if labels == "sync":
        assert row["examples"] is None
        assert row["by_position"] == row["before_end"] == []
        return
    assert row["examples"] == pytest.approx(interval(episodes, query=False))
    assert len(row["by_position"]) == 9
    for position, value in enumerate(row["by_position"]):
        assert value == pytest.approx(interval(episodes, query=False, position=position))
    ends = [max(q["position"] for q in of if not q["query"]) for of in episodes]
    from_end = [[{**q, "back": end - q["position"]} for q in of] for of, end in zip(episodes, ends, strict=True)]
    for back, value in enumerate(reversed(row["before_end"])):
        if back <= max(ends):
            assert value == pytest.approx(interval(from_end, query=False, back=back))


def test_two_data_sets_are_counted_by_order_and_part(few_shot_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(few_shot_folder)
    data = f"{few_shot_folder},{tmp_path / 'other'}"
    trained = settings_of(few_shot_folder, data=data, labels="delayed", queries=2, cut=2)
    rows = [row for row in few_shot_rows(trained, {"always 0": play(ConstantAgent(0), trained)})]
    own, episodes = [row for row in rows if row["name"] == "always 0"], counted(trained, 0)
    assert len(own) == 4
    for row in own:
        where = {"part": row["part"], "data_set": data.split(",").index(row["data"])}
        assert row["examples"] == pytest.approx(interval(episodes, query=False, **where))
        assert row["queries"] == pytest.approx(interval(episodes, query=True, **where))
        for seen, value in enumerate(row["by_seen"]):
            assert value == pytest.approx(interval(episodes, query=False, seen=seen, **where))
    order, switch = few_shot_tables(rows)
    assert len(order.cells) == len(switch.cells) == 1 + 2 * 5
    first = next(row for row in own if row["part"] == 0)
    assert order.cells[1][:4] == [
        "always 0", f"{few_shot_folder.name} then other", str(first["episodes"]), percent([first["examples"]])
    ]  # fmt: skip
    assert switch.cells[0][2:7] == ["-10", "-5", "-2", "-1", "0"]


def test_repeats_count_as_episodes(few_shot_folder: Path) -> None:
    trained = settings_of(few_shot_folder)
    once, twice = (few_shot_rows(trained, {"a": play(ConstantAgent(1), trained, repeats=n)})[0] for n in (1, 2))
    assert (once["episodes"], twice["episodes"]) == (40, 80)
    assert once["examples"] is not None
    assert twice["examples"] is not None
    assert once["examples"]["mean"] == pytest.approx(twice["examples"]["mean"])


def test_reference_policies_are_those_of_the_environment(few_shot_folder: Path) -> None:
    trained = settings_of(few_shot_folder, ways="3:5", labels="sync", queries=3)
    rows = {row["name"]: row for row in few_shot_rows(trained, {"a": play(ConstantAgent(1), trained)})}
    assert "labels alone" not in rows
    kwargs = pairs(trained.env_kwargs, "env_kwargs")
    returns = FewShotBatch.reference_returns(LEVELS, **kwargs)
    for name in ("nearest pixels", "blurred cosine"):
        queries = rows[name]["queries"]
        assert queries is not None
        assert queries["mean"] == pytest.approx(returns[name].mean(), abs=1e-6)
    env = FewShotBatch(1, **kwargs)
    steps = env.episodes(np.array(LEVELS))
    n_ways = [len(set(label[image >= 0])) for label, image in zip(steps.label, steps.image, strict=True)]
    chance = rows["chance"]["queries"]
    assert chance is not None
    assert {*n_ways} == {3, 4, 5}
    assert chance["mean"] == pytest.approx(np.mean([1 / n for n in n_ways]))


def test_settings_keep_the_size_of_labels(few_shot_folder: Path) -> None:
    trained = settings_of(few_shot_folder, ways="3:5")
    changed = with_outputs(trained, ("ways:2", "shots:1"))
    env = FewShotBatch(1, **pairs(changed.env_kwargs, "env_kwargs"))
    assert (env.protocol.ways, env.protocol.shots, env.protocol.outputs) == ((2, 2), (1, 1), 5)
    with pytest.raises(UserError, match="trained with 5 labels, too few for 6 ways"):
        with_outputs(trained, ("ways:6",))
    settings = [pairs(of.env_kwargs, "env_kwargs") for of in grid(trained, (2, 5), (1, 4))]
    assert [(of["ways"], of["shots"], of["queries"]) for of in settings] == [(2, 1, 1), (2, 4, 1), (5, 1, 1), (5, 4, 1)]
    assert grid(trained, (), ()) == []
    own = settings_of(few_shot_folder)
    assert [pairs(of.env_kwargs, "env_kwargs")["shots"] for of in grid(own, (), (1, 2, 3))] == [1, 3]
    ranges = settings_of(few_shot_folder, ways="3:5", shots="1:3", queries=2)
    settings = [pairs(of.env_kwargs, "env_kwargs") for of in grid(ranges, (3,), ())]
    assert [(of["ways"], of["shots"], of["queries"]) for of in settings] == [(3, "1:3", 2)]
    fixed = settings_of(few_shot_folder, ways=5, shots="1:3", queries=2)
    assert grid(fixed, (5,), ()) == []  # the run's own
    with pytest.raises(UserError, match="fewer than shots"):
        grid(trained, (), (12,))


def test_over_runs_the_interval_is_students(few_shot_folder: Path) -> None:
    trained = settings_of(few_shot_folder)
    runs = [few_shot_rows(trained, {"a": play(ConstantAgent(action), trained)}) for action in range(3)]
    assert over_runs(runs[:1]) == runs[0]
    means = [run[0]["examples"]["mean"] for run in runs if run[0]["examples"] is not None]
    row = over_runs(runs)[0]
    half = 4.302653 * np.std(means, ddof=1) / np.sqrt(3)  # t of two degrees of freedom
    assert row["examples"] == pytest.approx(
        {"mean": np.mean(means), "low": np.mean(means) - half, "high": np.mean(means) + half}
    )
    changed = settings_of(few_shot_folder, shots=1)
    other = few_shot_rows(changed, {"a": play(ConstantAgent(0), changed)})
    assert over_runs([runs[0], other]) == []


def test_percent() -> None:
    assert percent([{"mean": 0.5, "low": 0.45, "high": 0.55}]) == "50.0 ±5.0"
    assert percent([{"mean": 0.5, "low": 0.5, "high": 0.5}]) == "50.0"
    assert percent([{"mean": 0.5, "low": None, "high": None}]) == "50.0"
    assert percent([None]) == percent([]) == "-"
    assert percent([{"mean": 0.517, "low": 0.45, "high": 0.55}], digits=0) == "52"
