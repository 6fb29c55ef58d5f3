"""Learning through captured graphs: the gradient is the one without them, and they are given up where it is not.

Here a graph is stood in for by the same work, done again on the same memory; on a GPU the real one is tested too.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from srwm_rl.agents import IMPALA, PPO
from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.engine import graphed_gradient
from srwm_rl.agents.engine.graphed_gradient import GraphedGradient
from tests.agents.probe import Probe

Work = Callable[[], Tensor]
FRAMES = spaces.Box(0, 255, (8, 8, 3), np.uint8)
DICT = spaces.Dict({"frame": FRAMES, "seen": spaces.Box(-1, 1, (3,), np.float32)})


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a graph captures autograd, not C."""
    monkeypatch.setattr(PPO, "native_gradient", lambda *_: None)


def again(work: Work) -> Work:
    """Stand in for a graph: warm-ups that leave their gradient behind, then the same work on the same memory."""
    for _ in range(3):
        work()
    result = torch.zeros_like(work())

    def replay() -> Tensor:
        result.copy_(work())
        return result

    return replay


def devices() -> list[Any]:
    return ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def build(algo: str, device: str, **settings: Any) -> RecurrentAlgorithm:
    probe = {key: settings.pop(key) for key in ("observation_space", "action_space") if key in settings}
    env = DummyVecEnv([lambda: Probe(**probe) for _ in range(5)])
    kwargs = {"core_kwargs": {"hidden_size": 16, "n_layers": 2}, "encoder_kwargs": {"cnn": {"channels": [4]}}}
    shared = {"n_steps": 8, "seed": 0, "device": device, "policy_kwargs": kwargs, **settings}
    if algo == "impala":
        return IMPALA("SRWMPolicy", env, synchronous=True, **shared)
    return PPO("SRWMPolicy", env, **{"batch_size": 8 * 3, "n_epochs": 2, "ent_coef": 0.01, **shared})


def graphs_for(model: Any, capture: Any = again) -> GraphedGradient:
    """Let a model learn through graphs; on a GPU real ones."""
    on_gpu = model.device.type == "cuda"
    graphs = GraphedGradient(model.engine.add_gradient, model.engine.parameters, None if on_gpu else capture)
    engine, graphed = model.engine, model.engine._graphed
    # On a CPU the engine makes no graphs of its own.
    engine._graphed = lambda: graphs if graphs.fits(engine.parameters) else graphed()
    return graphs


def without_graphs(model: RecurrentAlgorithm) -> None:
    if model.device.type == "cuda":
        graphs_for(model).disabled = True


def weights(model: RecurrentAlgorithm) -> Tensor:
    return torch.cat([each.detach().cpu().flatten() for each in model.policy.parameters()])


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("ppo", {}),
    # Frames for two sequences at once: groups of 2 and 1, that is two graphs whose gradients add up.
    ("ppo", {"observation_space": DICT, "frames_at_once": 16, "clip_range": lambda left: 0.1 + 0.2 * left, "bptt": 4}),
    ("ppo", {"action_space": spaces.Box(-1, 1, (2,)), "clip_range_vf": 0.1, "normalize_advantage": False}),
    ("impala", {}),
    ("impala", {"observation_space": FRAMES, "frames_at_once": 18, "rho_clip": 2.0, "bptt": 4}),
]


@pytest.mark.parametrize(("algo", "settings"), RUNS)
@pytest.mark.parametrize("device", devices())
def test_the_same_is_learned_with_graphs_and_without(
    device: str, algo: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[Any] = []
    copied = graphed_gradient.copy_into
    monkeypatch.setattr(graphed_gradient, "copy_into", lambda *given: replays.append(given) or copied(*given))  # type: ignore[func-returns-value]
    plain = build(algo, device, **settings)
    without_graphs(plain)
    plain.learn(3 * 40)
    assert not replays
    graphed = build(algo, device, **settings)  # its seed is everybody's
    graphs, before = graphs_for(graphed), weights(graphed)
    graphed.learn(3 * 40)
    assert not graphs.disabled
    assert len(graphs._graphs) == (2 if "frames_at_once" in settings or algo == "ppo" else 1)
    assert len(replays) > 2 * len(graphs._graphs)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if device == "cpu" else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(weights(graphed), weights(plain), **tolerance)
    assert (weights(graphed) - before).abs().max() > 1e-3


class Two(nn.Module):
    """A weight that gets a gradient, and one that gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(3))
        self.factor = 1.0

    def gradient(self, given: Any) -> Tensor:
        x, y, power = given
        loss = (self.factor * self.used * (x["a"] - y) ** power).sum()
        loss.backward()
        return torch.stack((loss, x["a"].sum())).detach()


def given(n: int, seed: int, power: float = 2.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(n, 2, generator=generator)}, torch.randn((), generator=generator), power


def gradient_of(model: Two, parts: list[Any]) -> tuple[list[Tensor], Tensor]:
    plain = Two()
    plain.load_state_dict(model.state_dict())
    plain.factor = model.factor
    terms = [plain.gradient(each) for each in parts]
    assert plain.used.grad is not None
    return terms, plain.used.grad


def test_groups_add_up_in_place_whatever_takes_the_gradients_away() -> None:
    model = Two()
    graphs = GraphedGradient(model.gradient, list(model.parameters()), again)
    places = set()
    for update in range(4):
        parts = [given(n, 10 * update + i, 1.5 + update) for i, n in enumerate((4, 4, 3))]
        parts = [({"a": part[0]["a"].abs() + 3}, part[1], part[2]) for part in parts]
        graphs.zero()
        terms = [graphs(part) for part in parts]
        expected_terms, expected = gradient_of(model, parts)
        assert model.used.grad is not None
        torch.testing.assert_close(model.used.grad, expected)
        for one, other in zip(terms, expected_terms, strict=True):  # the first ones too: no replay writes over them
            torch.testing.assert_close(one, other)
        assert model.unused.grad is None  # as without graphs: an optimizer leaves it alone
        places.add(model.used.grad.data_ptr())
        with torch.no_grad():
            model.used.mul_(1.1)
        model.zero_grad(set_to_none=True)
    assert len(places) == 1
    assert len(graphs._graphs) == 2


def test_other_settings_get_graphs_of_their_own() -> None:
    model = Two()
    graphs = GraphedGradient(model.gradient, list(model.parameters()), again)
    for model.factor in (1.0, 1.0, 3.0, 3.0):
        graphs.zero()
        graphs(given(4, 0), settings=model.factor)
        torch.testing.assert_close(model.used.grad, gradient_of(model, [given(4, 0)])[1])
        assert len(graphs._graphs) == 1


def test_settings_that_never_rest_end_the_captures(caplog: pytest.LogCaptureFixture) -> None:
    model = Two()
    graphs = GraphedGradient(model.gradient, list(model.parameters()), again)
    with caplog.at_level(logging.WARNING):
        for i in range(3 * graphed_gradient.MAX_CAPTURES):
            model.factor = 1.0 + i
            graphs.zero()
            graphs(given(4, 0), settings=i)
            torch.testing.assert_close(model.used.grad, gradient_of(model, [given(4, 0)])[1])
    assert graphs.disabled
    assert caplog.text.count("its settings change too often") == 1


def test_only_a_few_shapes_get_a_graph() -> None:
    model = Two()
    made: list[Work] = []
    graphs = GraphedGradient(model.gradient, list(model.parameters()), lambda work: made.append(work) or again(work))  # type: ignore[func-returns-value]
    for n in [*range(2, 10), *range(2, 10)]:
        graphs.zero()
        graphs(given(n, n))
        torch.testing.assert_close(model.used.grad, gradient_of(model, [given(n, n)])[1])
    assert len(made) == graphed_gradient.MAX_SHAPES


def test_a_sick_gradient_passes_and_is_compared_with_nothing() -> None:
    model = Two()
    graphs = GraphedGradient(model.gradient, list(model.parameters()), again)
    sick = given(4, 0)
    sick[0]["a"][0, 0] = torch.nan
    for part in (sick, given(4, 1), sick, given(4, 2)):  # before there is a graph, and through it
        graphs.zero()
        graphs(part)
        torch.testing.assert_close(model.used.grad, gradient_of(model, [part])[1], equal_nan=True)
    assert len(graphs._graphs) == 1


def fails(_: Work) -> Work:
    try:
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")
    except RuntimeError:
        raise RuntimeError("operation failed due to a previous error") from None


def forgets(work: Work) -> Work:
    result = work()
    return lambda: result  # and adds no gradient


def tells_else(work: Work) -> Work:
    return lambda: work() + 7


def doubles(work: Work) -> Work:
    return lambda: (work(), work())[0]


WRONG = [(fails, "not permitted"), (forgets, "the gradient"), (doubles, "the gradient"), (tells_else, "the loss")]


@pytest.mark.parametrize(("capture", "why"), WRONG)
def test_graphs_that_fail_or_are_wrong_are_given_up(capture: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Two()
    graphs = GraphedGradient(model.gradient, list(model.parameters()), capture)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            graphs.zero()
            parts = [given(4, seed), given(3, seed)]
            terms = [graphs(part) for part in parts]
            expected_terms, expected = gradient_of(model, parts)
            torch.testing.assert_close(model.used.grad, expected)
            torch.testing.assert_close(terms, expected_terms)
            assert model.unused.grad is None
    assert graphs.disabled
    assert caplog.text.count("learning goes on without CUDA graphs") == 1
    assert why in caplog.text
    assert "previous error" not in caplog.text
    assert "and much more" not in caplog.text


def test_a_graph_that_turns_bad_for_a_second_shape_loses_no_gradient() -> None:
    model, made = Two(), []

    def second_fails(work: Work) -> Work:
        made.append(work)
        return again(work) if len(made) == 1 else fails(work)

    graphs = GraphedGradient(model.gradient, list(model.parameters()), second_fails)
    for seed in range(3):
        parts = [given(4, seed), given(4, seed + 5), given(3, seed)]
        graphs.zero()
        for part in parts:
            graphs(part)
        torch.testing.assert_close(model.used.grad, gradient_of(model, parts)[1])
    assert graphs.disabled
    assert not graphs._graphs  # nor the memory that it took
    assert graphs._grads == [None, None]


def test_while_it_captures_others_are_kept_out() -> None:
    class Quiet:
        held = False

        def __enter__(self) -> None:
            self.held = True

        def __exit__(self, *_: object) -> None:
            self.held = False

    quiet, model, seen = Quiet(), Two(), []
    graphs = GraphedGradient(
        model.gradient,
        list(model.parameters()),
        lambda work: seen.append(quiet.held) or again(work),
        quiet,  # type: ignore[func-returns-value]
    )
    graphs.zero()
    graphs(given(4, 0))
    assert seen == [True]
    assert not quiet.held


def test_another_policys_weights_are_learned_without_the_old_ones_graphs() -> None:
    model: Any = build("ppo", "cpu")
    graphs = graphs_for(model)
    model.learn(40)
    assert graphs._graphs
    model.policy = build("ppo", "cpu").policy
    before = weights(model)
    model.learn(40)
    assert not torch.equal(weights(model), before)
    assert not graphs.fits(model.engine.parameters)


@pytest.mark.parametrize(
    ("algo", "changes"),
    [
        ("ppo", {"ent_coef": 0.5}), ("ppo", {"vf_coef": 5.0}), ("ppo", {"bptt": 1}), ("impala", {"ent_coef": 5.0}),
        ("impala", {"vf_coef": 5.0}), ("impala", {"gamma": 0.1}), ("impala", {"rho_clip": 0.1, "c_clip": 0.1}),
    ],
)  # fmt: skip
def test_a_setting_that_is_changed_in_between_counts(algo: str, changes: dict[str, Any]) -> None:
    found = []
    for graphed, changed in ((False, True), (True, True), (True, False)):
        model = build(algo, "cpu")
        graphs = graphs_for(model) if graphed else None
        model.learn(40)
        for name, value in changes.items() if changed else ():
            setattr(model, name, value)
        model.learn(80, reset_num_timesteps=False)
        assert graphs is None or not graphs.disabled
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[2], found[0], rtol=1e-5, atol=1e-6)


def test_frozen_and_moved_weights_end_the_old_graphs() -> None:
    model = build("ppo", "cpu")
    policy, weights = model.policy, model.engine.parameters
    graphs = GraphedGradient(model.engine.add_gradient, weights, again, network=policy)
    assert graphs.fits(weights)
    with torch.no_grad():
        policy.value_net.weight.mul_(2)
    assert graphs.fits(weights)
    policy.features_extractor.requires_grad_(False)
    assert not graphs.fits(weights)
    policy.features_extractor.requires_grad_(True)
    assert graphs.fits(weights)
    policy.load_from_vector(policy.parameters_to_vector())
    assert not graphs.fits(weights)
