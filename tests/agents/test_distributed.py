"""Two processes train one policy: the gradient of one process with all the data, and the same decisions."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from srwm_rl import UserError
from srwm_rl.agents.collecting.unroll_queue import Unrolls, concatenate
from srwm_rl.agents.distributed import SINGLE, RankInfo, from_bytes, init_processes, to_bytes
from srwm_rl.storage.safe_file import read_file, unpack
from tests.agents.probe import collect_rollout, gradient_of, unroll_gradient
from tests.agents.two_processes import FIELDS, NON_FINITE, B, T, build, gradient

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of both processes; see `tests/agents/two_processes.py`."""
    folder = tmp_path_factory.mktemp("two_processes")
    argv = [*TORCHRUN, "tests.agents.two_processes", str(folder)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        _, err = process.communicate(timeout=600)
    finally:
        process.terminate()  # SIGKILL would leave its child processes
    assert process.returncode == 0, err
    return [unpack(*read_file(folder / f"{rank}.safetensors")) for rank in range(2)]


def test_weights_are_those_of_process_0(by_rank: Any) -> None:
    assert not np.array_equal(by_rank[0]["own_weights"], by_rank[1]["own_weights"])
    for process in by_rank:
        np.testing.assert_array_equal(process["joined_weights"], by_rank[0]["own_weights"])
    first, second = (process["joined_frozen"] for process in by_rank)
    assert "core.layers.0.frozen_weight" in first
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array)


def test_mean_and_deviation_are_joint_and_exact_far_from_zero(by_rank: Any) -> None:
    values = np.array([0.0, 1, 2, 5])
    small_std = 1e-3 * values.std(ddof=1)  # of which float32 has two digits so far from zero
    for process in by_rank:
        whole, half, small = process["moments"]
        assert whole == pytest.approx([1e6 + values.mean(), values.std(ddof=1)], rel=1e-6)
        assert half == pytest.approx([1e6 + values[[0, 2]].mean(), values[[0, 2]].std(ddof=1)], rel=1e-6)
        assert small == [pytest.approx(1e3 + 1e-3 * values.mean(), rel=1e-7), pytest.approx(small_std, rel=2e-2)]


def test_ppo_sends_a_message_per_pass_and_one_per_minibatch(by_rank: Any) -> None:
    for process in by_rank:
        assert process["messages"] == {"minibatches": 2 * B, "messages": 2 * (1 + B), "timesteps": 2 * T * B}


def test_trees_are_gathered_by_rank(by_rank: Any) -> None:
    for rank in range(2):
        everywhere = by_rank[rank]["all_gathered"]
        assert [len(process[0]["a"]) for process in everywhere] == [3, 4]
        assert [process[0]["b"] for process in everywhere] == [[b"x" * i, None, 1.5, True] for i in range(2)]
        assert [process[1] for process in everywhere] == ["text", "text"]
    assert [len(process[0]["a"]) for process in by_rank[0]["gathered"]] == [3, 4]
    assert [len(process[0]["a"]) for process in by_rank[1]["gathered"]] == [4]


def relative(results: np.ndarray, expected: np.ndarray) -> float:
    assert np.linalg.norm(expected) > 1e-3
    return float(np.linalg.norm(results - expected) / np.linalg.norm(expected))


def whole_model(algo: str, weights: np.ndarray) -> Any:
    model = build(algo, n_envs=2 * B)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(weights), model.policy.parameters())
    return model


def test_ppo_has_the_gradient_of_one_process_with_both_rollouts(by_rank: Any) -> None:
    parts = [process["ppo"]["rollout"] for process in by_rank]
    model = whole_model("ppo", by_rank[0]["ppo"]["weights"])
    buffer = collect_rollout(model)  # for its shape; the data are replaced
    for name in FIELDS:
        both = np.concatenate([process[name] for process in parts], axis=1)
        getattr(buffer.tensors, name).copy_(torch.from_numpy(both))
    buffer.core_states = torch.from_numpy(np.concatenate([process["core_state"] for process in parts], axis=1))
    terms, norm = gradient_of(model, np.arange(2 * B))
    check_same_update(by_rank, "ppo", gradient(model), terms, norm)
    # Normalisation by each process's own mean would give something else.
    halves = []
    for rank in range(2):
        gradient_of(model, np.arange(B) + rank * B)
        halves.append(gradient(model))
    assert relative(sum(halves) / 2, by_rank[0]["ppo"]["gradient"]) > 1e-2


def test_impala_has_the_gradient_of_one_process_with_both_batches(by_rank: Any) -> None:
    unrolls = [Unrolls.from_tree(process["impala"]["rollout"], torch.device("cpu")) for process in by_rank]
    model = whole_model("impala", by_rank[0]["impala"]["weights"])
    terms, norm = unroll_gradient(model, concatenate(unrolls))
    check_same_update(by_rank, "impala", gradient(model), terms, norm)


def check_same_update(by_rank: Any, algo: str, expected: np.ndarray, terms: Any, norm: torch.Tensor) -> None:
    assert not np.array_equal(*(process[algo]["rollout"]["actions"] for process in by_rank)), "both played the same"
    np.testing.assert_array_equal(by_rank[0][algo]["gradient"], by_rank[1][algo]["gradient"])
    for process in by_rank:
        assert relative(process[algo]["gradient"], expected) < 1e-6
        assert process[algo]["norm"] == pytest.approx(norm.item(), rel=1e-6)
        assert process[algo]["terms"] == pytest.approx({k: v.item() for k, v in terms._asdict().items()}, rel=1e-4)


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_steps_and_episodes_of_both_are_counted(algo: str, by_rank: Any) -> None:
    assert [process[algo]["timesteps"] for process in by_rank] == [2 * B * T] * 2
    # Episodes of five steps pay 1 + 2 + 3 + 4 + 5; in eight steps each environment ends one.
    assert by_rank[0][algo]["episodes"] == [15.0] * 2 * B
    assert by_rank[1][algo]["episodes"] == [15.0] * B


@pytest.mark.parametrize("how", ["logits", "nan"])
@pytest.mark.parametrize("algo", NON_FINITE)
def test_a_non_finite_number_in_one_process_is_skipped_by_both(algo: str, how: str, by_rank: Any) -> None:
    results = [process[f"{algo}_{how}_skip"] for process in by_rank]
    assert [process["skipped"] for process in results] == [1, 1]
    for process in results:
        np.testing.assert_array_equal(process["before"], results[0]["before"])
        np.testing.assert_array_equal(process["after"], results[0]["after"])
        assert not np.array_equal(process["before"], process["after"]), "nothing was learned after it"
        assert np.isfinite(process["after"]).all()


@pytest.mark.parametrize("how", ["logits", "nan"])
@pytest.mark.parametrize("algo", NON_FINITE)
def test_a_non_finite_number_in_one_process_stops_both(algo: str, how: str, by_rank: Any) -> None:
    for process in by_rank:
        results = process[f"{algo}_{how}_stop"]
        assert "not finite in update 0" in results["message"]
        np.testing.assert_array_equal(results["before"], results["after"])


def test_learners_beside_the_actors_make_the_same_updates(by_rank: Any) -> None:
    results = [process["overlapped"] for process in by_rank]
    for name in ("timesteps", "planned"):
        assert [process[name] for process in results] == [2 * B * T * 6] * 2
    for process in results:
        assert 0 == min(process["remaining"]) < max(process["remaining"])
    assert [process["updates"] for process in results] == [B * 6 // 2] * 2
    np.testing.assert_array_equal(results[0]["weights"], results[1]["weights"])
    assert not np.array_equal(results[0]["weights"], by_rank[0]["own_weights"])


def test_abandon_ends_an_operation_that_waits_and_refuses_later_ones(by_rank: Any) -> None:
    assert by_rank[0]["abandoned"]["messages"] == ["this process has left the others"] * 2


def test_a_single_process_needs_no_communication() -> None:
    tree = {"a": np.arange(3)}
    assert init_processes(RankInfo(), "cpu") is SINGLE
    assert SINGLE.first
    assert SINGLE.gather(tree)[0] is tree
    assert SINGLE.all_gather(tree)[0] is tree
    values = torch.randn(5, 7)
    moments = SINGLE.means_and_stds([values, values[:2]])
    assert SINGLE.means_and_stds([values[:1, :1]]) == [None]
    torch.testing.assert_close(moments, [(part.mean(), part.std()) for part in (values, values[:2])])
    SINGLE.sum_([values])
    SINGLE.close()


def test_trees_survive_conversion_to_bytes() -> None:
    tree = {
        "n": None, "f": 1.5, "nan": float("nan"), "s": "é", "b": b"\0\xff", "l": [1, [True]],
        "a": {"0d": np.array(3.0), "empty": np.zeros((0, 2)), "u8": np.arange(6, dtype=np.uint8).reshape(2, 3)[:, ::2]},
    }  # fmt: skip
    back = from_bytes(bytes(to_bytes(tree)))
    for name, array in tree.pop("a").items():  # type: ignore[attr-defined]
        np.testing.assert_array_equal(back["a"][name], array)
        assert back["a"][name].dtype == array.dtype
        assert back["a"][name].shape == array.shape
    assert np.isnan(back.pop("nan"))
    tree.pop("nan")
    assert back.keys() - {"a"} == tree.keys()
    assert all(back[name] == tree[name] for name in tree)


GOOD = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
GOOD |= {"MASTER_ADDR": "host", "MASTER_PORT": "1"}


def test_torchruns_variables_are_read() -> None:
    assert RankInfo.of(GOOD) == RankInfo(rank=1, size=4, local_rank=1, local_size=2)
    assert RankInfo.of({}) == RankInfo.of({"WORLD_SIZE": "1", "RANK": "nonsense"}) == RankInfo(0, 1, 0, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": ""}, {"RANK": "4"}, {"RANK": "-1"}, {"RANK": "x"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "many"},
        {"LOCAL_RANK": "2"}, {"LOCAL_WORLD_SIZE": "5"}, {"MASTER_ADDR": ""}, {"MASTER_PORT": ""},
    ],
)  # fmt: skip
def test_inconsistent_torchrun_variables_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(UserError, match="started with torchrun"):
        RankInfo.of({**GOOD, **wrong})
