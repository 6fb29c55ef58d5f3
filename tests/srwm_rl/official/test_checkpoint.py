"""Imported agents of the published RL code act as they did there; misfits are named."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from srwm_rl import SRWMPolicy, UserError, load
from srwm_rl.official import import_checkpoint
from srwm_rl.official.checkpoint import read_checkpoint
from srwm_rl.official.importer import build_policy
from srwm_rl.storage.model_file import policy_arrays
from tests.srwm_rl.hostile import official_checkpoints as official

GOLDEN = Path(__file__).parents[2] / "golden"


CORES = tuple(official.OPTIONS)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "full_srwm.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> SRWMPolicy:
    folder = import_checkpoint(GOLDEN / "full_srwm_model.tar", tmp_path_factory.mktemp("golden") / "run")
    return load(folder).policy


def observations(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the golden observations `[T, B, ...]` as our environments would make them."""
    frames = data["frame"].permute(0, 1, 3, 4, 2).contiguous()
    return {"observation": frames, "previous_reward": data["reward"].clamp(-1, 1)[..., None]}


def test_step_by_step_the_six_game_agent_has_the_authors_outputs(
    golden: dict[str, Tensor], imported: SRWMPolicy
) -> None:
    obs = observations(golden)
    state = imported.initial_state(2)
    for t in range(len(golden["done"])):
        now = {key: array[t] for key, array in obs.items()}
        with torch.no_grad():
            distribution, _ = imported.get_distribution(now, (state,), golden["done"][t])
            step = imported.act(now, state, golden["done"][t], deterministic=True)
        log_probs = golden["policy_logits"][t].log_softmax(-1)
        torch.testing.assert_close(distribution.distribution.logits, log_probs, rtol=0, atol=1e-4)
        torch.testing.assert_close(step.values, golden["baseline"][t], rtol=0, atol=1e-4)
        assert step.actions.tolist() == golden["argmax_action"][t].tolist()
        state = step.core_state


def test_one_sequence_equals_the_authors_outputs(golden: dict[str, Tensor], imported: SRWMPolicy) -> None:
    obs, wanted = observations(golden), golden["policy_logits"].log_softmax(-1)
    for action in range(15):
        actions = torch.full_like(golden["argmax_action"], action)
        with torch.no_grad():
            answer = imported.evaluate_sequence(obs, actions, imported.initial_state(2), golden["done"])
        torch.testing.assert_close(answer.log_probs, wanted[..., action], rtol=0, atol=1e-4)
        torch.testing.assert_close(answer.values, golden["baseline"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("part", ["frame", "reward", "done"])
def test_each_golden_input_matters(part: str, golden: dict[str, Tensor], imported: SRWMPolicy) -> None:
    changed = {**golden, part: torch.zeros_like(golden[part])}
    with torch.no_grad():
        answer = imported.evaluate_sequence(
            observations(changed), golden["argmax_action"], imported.initial_state(2), changed["done"]
        )
    assert (answer.values - golden["baseline"]).abs().max() > 1e-4


@pytest.mark.parametrize("core", CORES)
def test_every_core_is_imported_bit_for_bit(core: str, tmp_path: Path) -> None:
    policy = official.make_policy(core)
    folder = import_checkpoint(official.make_checkpoint(tmp_path / "model.tar", core), tmp_path / "run")
    agent = load(folder)
    assert agent.policy.core_name == core
    assert agent.policy.core_kwargs == policy.core_kwargs
    assert agent.num_timesteps == 1600
    before, after = policy_arrays(policy), policy_arrays(agent.policy)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_the_simplest_agent_has_no_core_at_all(tmp_path: Path) -> None:
    policy = official.make_policy("lstm")
    weights = {
        name: weight for name, weight in official.published_weights(policy).items() if not name.startswith("core.")
    }
    weights["policy.weight"], weights["baseline.weight"] = torch.randn(15, 7), torch.randn(1, 7)
    path = official.save(tmp_path / "model.tar", weights, {"use_lstm": False, **official.PAPER6})
    agent = load(import_checkpoint(path, tmp_path / "run")).policy
    agent.observation_space.seed(0)
    obs = {key: torch.as_tensor(np.stack([weight.sample()])) for key, weight in agent.observation_space.spaces.items()}
    with torch.no_grad():
        features = torch.cat((policy.encode(obs, 1)[:, :6], obs["previous_reward"]), dim=1)
        distribution, _ = agent.get_distribution(obs, (agent.initial_state(1),), torch.ones(1))
        values = agent.predict_values(obs, (agent.initial_state(1),), torch.ones(1))
    logits = F.linear(features, weights["policy.weight"], weights["policy.bias"])
    torch.testing.assert_close(distribution.distribution.logits, logits.log_softmax(-1), rtol=1e-5, atol=1e-4)
    wanted = F.linear(features, weights["baseline.weight"], weights["baseline.bias"])
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-4)


ONLY_SRWM = {"use_sr": True}
TRAINED = [
    ({**ONLY_SRWM, **official.PAPER6}, "bigfish,fruitbot,maze,leaper,plunder,starpilot", "easy", "0:200", "1000:1200"),
    (
        {**ONLY_SRWM, "multi_env": 4, "distribution_mode": "memory", "num_levels": 500},
        "dodgeball,heist,maze,miner",
        "memory",
        "0:500",
        "1000:1200",
    ),
    ({"env": "procgen:procgen-coinrun-v0", "multi_env": 1}, "coinrun", "hard", "all", "1000:1200"),
    ({"env": "procgen-ninja-v0", "start_level": 900, "num_levels": 300}, "ninja", "hard", "900:1200", "1200:1400"),
    (None, "bigfish,fruitbot,maze,leaper,plunder,starpilot", "easy", "0:200", "1000:1200"),
]


@pytest.mark.parametrize(("flags", "games", "mode", "levels", "eval_levels"), TRAINED)
def test_games_and_levels_follow_the_flags(
    flags: dict[str, Any] | None, games: str, mode: str, levels: str, eval_levels: str, tmp_path: Path
) -> None:
    path = official.save(tmp_path / "model.tar", official.published_weights(official.make_policy("srwm")), flags)
    training = read_checkpoint(path).training
    assert (training["env"], training["mode"], training["levels"]) == (games, mode, levels)
    assert training["eval_levels"] == eval_levels


def test_flags_distinguish_agents_with_equal_weights(tmp_path: Path) -> None:
    weights = official.published_weights(official.make_policy("srwm_no_carry"))
    flagged = read_checkpoint(official.save(tmp_path / "a", weights, {"use_no_carry_sr": True, **official.PAPER6}))
    assert (flagged.core, flagged.notes) == ("srwm_no_carry", ())
    unflagged = read_checkpoint(official.save(tmp_path / "b", weights, None))
    assert unflagged.core == "srwm"
    assert ["carries over" in note for note in unflagged.notes] == [True, False]
    assert "the paper's six" in unflagged.notes[1]


def test_the_runs_settings_build_its_environments(tmp_path: Path) -> None:
    path = official.make_checkpoint(tmp_path / "model.tar", num_actors=48, discounting=0.9, total_steps=3000)
    config = json.loads((import_checkpoint(path, tmp_path / "run") / "config.json").read_text())
    train = config["train"]
    assert (train["algo"], train["core"], train["inputs"]) == ("impala", "srwm", ["reward"])
    assert (train["n_envs"], train["gamma"], train["n_timesteps"]) == (48, 0.9, 3000)
    assert train["normalize_reward"] is False
    assert config["imported"]["n_weights"] == sum(
        weight.numel() for weight in official.published_weights(official.make_policy("srwm")).values()
    )
    assert "somewhere" not in json.dumps(config)  # the authors' paths are not copied


def change_weights(path: Path, change: Any, **flags: Any) -> Path:
    weights = official.published_weights(official.make_policy("srwm"))
    change(weights)
    return official.save(path, weights, {**ONLY_SRWM, **official.PAPER6, **flags})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("fc.bias"), "weight 'fc.bias' is missing"),
        (lambda w: w.pop("resnet2.1.3.weight"), "weight 'resnet2.1.3.weight' is missing"),
        (lambda w: w.pop("core.fwm_layers.1.W_k"), "fwm_layers.1.W_k' is missing"),
        (lambda w: w.update(extra=torch.ones(1)), "surplus weight 'extra'"),
        (lambda w: w.update({"core.extra": torch.ones(1)}), "'extra'"),
        (lambda w: w.update({"policy.weight": torch.ones(6, 8)}), r"'policy.weight' must be \[15, 8\], not \[6, 8\]"),
        (lambda w: w.update({"fc.weight": torch.ones(6, 5)}), r"'fc.weight' must be \[6, 768\], not \[6, 5\]"),
        (lambda w: w.update({"core.input_proj.weight": torch.ones(8, 6)}), "core reads 6 features, not 7"),
        (lambda w: w.update({"core.input_proj.weight": torch.ones(8**5, 7)}), "much larger network"),
        (lambda w: w["fc.bias"].fill_(torch.nan), "'fc.bias' is not finite"),
        (lambda w: w.update({"fc.bias": torch.full((6,), 1e300, dtype=torch.float64)}), "'fc.bias' is not finite"),
        (lambda w: w.update({"fc.bias": torch.ones(6, dtype=torch.int64)}), "'fc.bias' is of type int64"),
        (lambda w: w.update({"fc.bias": torch.ones(6, dtype=torch.bfloat16)}), "BFloat16Storage', which is not"),
        (lambda w: w.update({"fc.bias": 3}), "'fc.bias' is no tensor"),
        (lambda w: w.update({"fwm_layers.²": torch.ones(1)}), "a name that cannot be"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Any, message: str, tmp_path: Path) -> None:
    path = change_weights(tmp_path / "model.tar", change)
    with pytest.raises(UserError, match=message) as error:
        import_checkpoint(path, tmp_path / "run")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.tar"]


def test_weights_of_other_float_types_and_layouts_are_read(tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["policy.weight"] = weights["policy.weight"].double()
        weights["fc.weight"] = weights["fc.weight"].t().contiguous().t()  # strides by column
        weights["fc.bias"] = torch.cat((torch.ones(3), weights["fc.bias"]))[3:]  # at an offset in its storage
        weights["baseline.bias"] = weights["baseline.bias"].half()

    checkpoint = read_checkpoint(change_weights(tmp_path / "model.tar", change))
    wanted = official.published_weights(official.make_policy("srwm"))
    for name, array in checkpoint.weights.items():
        assert array.dtype == np.float32
        tolerance = 1e-3 if name == "baseline.bias" else 0
        torch.testing.assert_close(torch.from_numpy(array), wanted[name], rtol=tolerance, atol=0, msg=name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"use_sr": False, "use_delta": True}, "options say --use_delta, its weights are those of srwm"),
        ({"use_sr": False}, "options say no core at all"),
        ({"use_sr": False, "use_rec_delta": True}, "an agent of --use_rec_delta, which srwm-rl does not have"),
        ({"multi_env": 1, "env": "PongNoFrameskip-v4"}, "trained on 'PongNoFrameskip-v4'; only agents of ProcGen"),
        ({"multi_env": 17}, "only agents of ProcGen"),
        ({"distribution_mode": "simple"}, "no distribution mode 'simple'"),
        ({"num_levels": -1}, "cannot have been trained on -1 levels"),
        ({"start_level": 2**31}, "cannot have been trained on"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = change_weights(tmp_path / "model.tar", lambda _: None, **flags)
    with pytest.raises(UserError, match=message):
        import_checkpoint(path, tmp_path / "run")


def test_only_a_new_or_empty_folder_is_filled(tmp_path: Path) -> None:
    path = official.make_checkpoint(tmp_path / "model.tar")
    (tmp_path / "empty").mkdir()
    assert load(import_checkpoint(path, tmp_path / "empty")).policy.core_name == "srwm"
    assert load(import_checkpoint(str(path), str(tmp_path / "a" / "b"))).policy.core_name == "srwm"
    for taken in (tmp_path, path, tmp_path / "empty"):
        with pytest.raises(UserError, match="exists already"):
            import_checkpoint(path, taken)
    with pytest.raises(UserError, match="cannot make the run folder"):
        import_checkpoint(path, path / "run")


def test_a_failed_import_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("srwm_rl.official.importer.save_model", full)
    path = official.make_checkpoint(tmp_path / "model.tar")
    with pytest.raises(UserError, match="No space left on device"):
        import_checkpoint(path, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["model.tar"]


def test_other_saved_objects_are_refused(tmp_path: Path) -> None:
    for content in (torch.ones(3), {"weights": 1}, [1], {"model_state_dict": {}}, torch.nn.Linear(2, 2)):
        torch.save(content, tmp_path / "model.tar")
        with pytest.raises(UserError, match="no model_state_dict"):
            read_checkpoint(tmp_path / "model.tar")


class Hostile:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.victim),)


def test_a_hostile_checkpoint_is_read_and_runs_nothing(tmp_path: Path) -> None:
    flags = {"use_sr": True, **official.PAPER6, "batch_size": Hostile(tmp_path / "victim")}
    path = official.save(tmp_path / "model.tar", official.published_weights(official.make_policy("srwm")), flags)
    assert load(import_checkpoint(path, tmp_path / "run")).policy.core_name == "srwm"
    assert not (tmp_path / "victim").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "victim").exists()


def test_the_core_is_checked_before_it_is_built(tmp_path: Path) -> None:
    weights = {
        name: weight.numpy() for name, weight in official.published_weights(official.make_policy("lstm")).items()
    }
    for i in range(1, 4):
        weights[f"core.weight_ih_l{i}"] = np.zeros((1, 1), np.float32)
    with pytest.raises(UserError, match="weight_ih_l1' must be"):
        build_policy("lstm", weights, "file")
