"""Gradients by captured CUDA graphs: they equal those without, and graphs are disabled where they do not.

On a CPU `eager_graph` stands in for the graph; tests marked `gpu` capture real ones.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from srwm_rl.agents import PPO
from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.engine import graphed_gradient
from srwm_rl.agents.engine.graphed_gradient import GraphedGradient
from tests.agents.probe import capturing, eager_graph, small_model, weight_vector

Work = Callable[[], Tensor]
FRAMES = spaces.Box(0, 255, (8, 8, 3), np.uint8)
DICT = spaces.Dict({"frame": FRAMES, "vector": spaces.Box(-1, 1, (3,), np.float32)})


@pytest.fixture(autouse=True)
def _without_native_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a graph captures autograd, not C."""
    monkeypatch.setattr(PPO, "native_gradient", lambda *_: None)


def build(algo: str, device: str = "cpu", **settings: Any) -> Any:
    if algo == "ppo":
        settings = {"batch_size": 8 * 3, "n_epochs": 2, "ent_coef": 0.01, **settings}
    return small_model(algo, n_envs=5, n_layers=2, device=device, **settings)


def graphs_for(model: Any) -> GraphedGradient:
    """Let a model learn by graphs; on a GPU real ones."""
    on_gpu = model.device.type == "cuda"
    graphs = GraphedGradient(model.engine.add_gradient, model.engine.parameters, model.policy, model.weights_lock)
    capturing(graphs, None if on_gpu else eager_graph)
    engine, graphed = model.engine, model.engine._graphed
    # The engine itself uses graphs on a GPU only.
    engine._graphed = lambda: graphs if graphs.fits(engine.parameters) else graphed()
    return graphs


def without_graphs(model: RecurrentAlgorithm) -> None:
    if model.device.type == "cuda":
        graphs_for(model).disabled = True


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("ppo", {}),
    # Two sequences at once: micro-batches of 2 and 1, hence two graphs whose gradients accumulate.
    ("ppo", {"observation_space": DICT, "frames_at_once": 16, "clip_range": lambda left: 0.1 + 0.2 * left, "bptt": 4}),
    ("ppo", {"action_space": spaces.Box(-1, 1, (2,)), "clip_range_vf": 0.1, "normalize_advantage": False}),
    ("impala", {}),
    ("impala", {"observation_space": FRAMES, "frames_at_once": 18, "rho_clip": 2.0, "bptt": 4}),
]


@pytest.mark.parametrize(("algo", "settings"), RUNS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_learning_with_graphs_gives_the_weights_of_learning_without(
    device: str, algo: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[Any] = []
    copy_into = graphed_gradient.copy_into
    monkeypatch.setattr(graphed_gradient, "copy_into", lambda *args: replays.append(args) or copy_into(*args))  # type: ignore[func-returns-value]
    plain = build(algo, device, **settings)
    without_graphs(plain)
    plain.learn(3 * 40)
    assert not replays
    graphed = build(algo, device, **settings)
    graphs, before = graphs_for(graphed), weight_vector(graphed)
    graphed.learn(3 * 40)
    assert not graphs.disabled
    assert len(graphs._graphs) == (2 if "frames_at_once" in settings or algo == "ppo" else 1)
    assert len(replays) > len(graphs._graphs)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if device == "cpu" else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(weight_vector(graphed), weight_vector(plain), **tolerance)
    assert (weight_vector(graphed) - before).abs().max() > 1e-3


class TwoWeights(nn.Module):
    """A weight that gets a gradient, and one that gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(3))
        self.factor = 1.0

    def gradient(self, args: Any) -> Tensor:
        x, y, power = args
        loss = (self.factor * self.used * (x["a"] - y) ** power).sum()
        loss.backward()
        return torch.stack((loss, x["a"].sum())).detach()


def graphs_of(model: TwoWeights, capture: Any = eager_graph, lock: Any = None) -> GraphedGradient:
    graphs = GraphedGradient(model.gradient, list(model.parameters()), model, lock or nullcontext())
    return capturing(graphs, capture)


def micro_batch(n: int, seed: int, power: float = 2.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(n, 2, generator=generator)}, torch.randn((), generator=generator), power


def expected_gradient(model: TwoWeights, parts: list[Any]) -> tuple[list[Tensor], Tensor]:
    plain = TwoWeights()
    plain.load_state_dict(model.state_dict())
    plain.factor = model.factor
    terms = [plain.gradient(part) for part in parts]
    assert plain.used.grad is not None
    return terms, plain.used.grad


def test_micro_batches_accumulate_in_the_same_memory_after_gradients_are_set_to_none() -> None:
    model = TwoWeights()
    graphs = graphs_of(model)
    addresses = set()
    for update in range(4):
        parts = [micro_batch(n, 10 * update + i, 1.5 + update) for i, n in enumerate((4, 4, 3))]
        parts = [({"a": part[0]["a"].abs() + 3}, part[1], part[2]) for part in parts]
        graphs.zero()
        terms = [graphs(part) for part in parts]
        expected_terms, expected = expected_gradient(model, parts)
        assert model.used.grad is not None
        torch.testing.assert_close(model.used.grad, expected)
        torch.testing.assert_close(terms, expected_terms)  # all of them: no replay overwrites earlier ones
        assert model.unused.grad is None  # as without graphs, so that the optimizer does not update it
        addresses.add(model.used.grad.data_ptr())
        with torch.no_grad():
            model.used.mul_(1.1)
        model.zero_grad(set_to_none=True)
    assert len(addresses) == 1
    assert len(graphs._graphs) == 2


def test_changed_settings_are_captured_again() -> None:
    model = TwoWeights()
    graphs = graphs_of(model)
    for model.factor in (1.0, 1.0, 3.0, 3.0):
        graphs.zero()
        graphs(micro_batch(4, 0), settings=model.factor)
        torch.testing.assert_close(model.used.grad, expected_gradient(model, [micro_batch(4, 0)])[1])
        assert len(graphs._graphs) == 1


def test_graphs_are_disabled_if_settings_change_too_often(caplog: pytest.LogCaptureFixture) -> None:
    model = TwoWeights()
    graphs = graphs_of(model)
    with caplog.at_level(logging.WARNING):
        for i in range(3 * graphed_gradient.MAX_CAPTURES):
            model.factor = 1.0 + i
            graphs.zero()
            graphs(micro_batch(4, 0), settings=i)
            torch.testing.assert_close(model.used.grad, expected_gradient(model, [micro_batch(4, 0)])[1])
    assert graphs.disabled
    assert caplog.text.count("its settings change too often") == 1


def test_at_most_max_shapes_graphs_are_captured() -> None:
    model = TwoWeights()
    captured: list[Work] = []
    graphs = graphs_of(model, lambda work: captured.append(work) or eager_graph(work))  # type: ignore[func-returns-value]
    for n in [*range(2, 10), *range(2, 10)]:
        graphs.zero()
        graphs(micro_batch(n, n))
        torch.testing.assert_close(model.used.grad, expected_gradient(model, [micro_batch(n, n)])[1])
    assert len(captured) == graphed_gradient.MAX_SHAPES


def test_a_non_finite_gradient_is_passed_on_and_not_compared() -> None:
    model = TwoWeights()
    graphs = graphs_of(model)
    non_finite = micro_batch(4, 0)
    non_finite[0]["a"][0, 0] = torch.nan
    for part in (non_finite, micro_batch(4, 1), non_finite, micro_batch(4, 2)):  # before the capture, and by the graph
        graphs.zero()
        graphs(part)
        torch.testing.assert_close(model.used.grad, expected_gradient(model, [part])[1], equal_nan=True)
    assert len(graphs._graphs) == 1


def failing(_: Work) -> Work:
    try:
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")
    except RuntimeError:
        raise RuntimeError("operation failed due to a previous error") from None


def adding_no_gradient(work: Work) -> Work:
    result = work()
    return lambda: result


def adding_the_gradient_twice(work: Work) -> Work:
    return lambda: (work(), work())[0]


def returning_another_loss(work: Work) -> Work:
    return lambda: work() + 7


@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        (failing, "not permitted"),
        (adding_no_gradient, "the gradient"),
        (adding_the_gradient_twice, "the gradient"),
        (returning_another_loss, "the loss"),
    ],
)
def test_graphs_are_disabled_if_the_capture_fails_or_its_results_differ(
    capture: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = TwoWeights()
    graphs = graphs_of(model, capture)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            graphs.zero()
            parts = [micro_batch(4, seed), micro_batch(3, seed)]
            terms = [graphs(part) for part in parts]
            expected_terms, expected = expected_gradient(model, parts)
            torch.testing.assert_close(model.used.grad, expected)
            torch.testing.assert_close(terms, expected_terms)
            assert model.unused.grad is None
    assert graphs.disabled
    assert caplog.text.count("learning goes on without CUDA graphs") == 1
    assert reason in caplog.text
    assert "previous error" not in caplog.text
    assert "and much more" not in caplog.text


def test_a_failed_capture_for_a_second_shape_loses_no_gradient() -> None:
    model, captured = TwoWeights(), []

    def second_fails(work: Work) -> Work:
        captured.append(work)
        return eager_graph(work) if len(captured) == 1 else failing(work)

    graphs = graphs_of(model, second_fails)
    for seed in range(3):
        parts = [micro_batch(4, seed), micro_batch(4, seed + 5), micro_batch(3, seed)]
        graphs.zero()
        for part in parts:
            graphs(part)
        torch.testing.assert_close(model.used.grad, expected_gradient(model, parts)[1])
    assert graphs.disabled
    assert not graphs._graphs  # their memory is released
    assert graphs._grads == [None, None]


def test_the_lock_is_held_while_capturing() -> None:
    lock, model, locked = Lock(), TwoWeights(), []

    def capture(work: Work) -> Work:
        locked.append(lock.locked())
        return eager_graph(work)

    graphs = graphs_of(model, capture, lock)
    graphs.zero()
    graphs(micro_batch(4, 0))
    assert locked == [True]
    assert not lock.locked()


def test_a_new_policy_is_trained_without_the_old_policys_graphs() -> None:
    model = build("ppo")
    graphs = graphs_for(model)
    model.learn(40)
    assert graphs._graphs
    model.policy = build("ppo").policy
    before = weight_vector(model)
    model.learn(40)
    assert not torch.equal(weight_vector(model), before)
    assert not graphs.fits(model.engine.parameters)


@pytest.mark.parametrize(
    ("algo", "changes"),
    [
        ("ppo", {"ent_coef": 0.5}), ("ppo", {"vf_coef": 5.0}), ("ppo", {"bptt": 1}), ("impala", {"ent_coef": 5.0}),
        ("impala", {"vf_coef": 5.0}), ("impala", {"gamma": 0.1}), ("impala", {"rho_clip": 0.1, "c_clip": 0.1}),
    ],
)  # fmt: skip
def test_settings_changed_between_two_learn_calls_take_effect(algo: str, changes: dict[str, Any]) -> None:
    results = []
    for graphed, changed in ((False, True), (True, True), (True, False)):
        model = build(algo)
        graphs = graphs_for(model) if graphed else None
        model.learn(40)
        for name, value in changes.items() if changed else ():
            setattr(model, name, value)
        model.learn(80, reset_num_timesteps=False)
        assert graphs is None or not graphs.disabled
        results.append(weight_vector(model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[2], results[0], rtol=1e-5, atol=1e-6)


def test_graphs_do_not_fit_frozen_or_moved_weights() -> None:
    model = build("ppo")
    policy, parameters = model.policy, model.engine.parameters
    graphs = GraphedGradient(model.engine.add_gradient, parameters, policy, model.weights_lock)
    assert graphs.fits(parameters)
    with torch.no_grad():
        policy.value_net.weight.mul_(2)
    assert graphs.fits(parameters)
    policy.features_extractor.requires_grad_(False)
    assert not graphs.fits(parameters)
    policy.features_extractor.requires_grad_(True)
    assert graphs.fits(parameters)
    policy.load_from_vector(policy.parameters_to_vector())
    assert not graphs.fits(parameters)
