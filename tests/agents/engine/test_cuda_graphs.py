"""Acting by a captured CUDA graph: it gives the policy's results, and is disabled where it does not.

On a CPU `eager_graph` stands in for the graph; tests marked `gpu` capture real ones.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl.agents.engine import cuda_graphs
from srwm_rl.agents.engine.cuda_graphs import GraphedActing, copy_into
from srwm_rl.nn.policy import ActStep, SRWMPolicy
from tests.agents.probe import capturing, eager_graph

SPACE = spaces.Dict({"frame": spaces.Box(0, 255, (8, 8, 3), np.uint8), "vector": spaces.Box(-1, 1, (3,), np.float32)})


def policy_on(device: str) -> SRWMPolicy:
    torch.manual_seed(0)
    cores = {"hidden_size": 16, "n_layers": 2, "n_heads": 2}
    policy = SRWMPolicy(SPACE, spaces.Discrete(5), lambda _: 0.0, core_kwargs=cores, ortho_init=False)
    policy.set_training_mode(False)
    return policy.to(device)


def inputs(policy: SRWMPolicy, batch: int, seed: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frame = torch.randint(256, (batch, 8, 8, 3), generator=generator, dtype=torch.uint8)
    vector = torch.rand(batch, 3, generator=generator)
    state = 0.1 * torch.randn(policy.initial_state(batch).shape, generator=generator)
    starts = (torch.rand(batch, generator=generator) < 0.5).float()
    device = policy.device
    return {"frame": frame.to(device), "vector": vector.to(device)}, state.to(device), starts.to(device)


devices = pytest.mark.parametrize(
    ("device", "capture"), [("cpu", eager_graph), pytest.param("cuda", None, marks=pytest.mark.gpu)]
)


@devices
def test_a_graph_gives_the_policys_results_after_the_weights_have_changed_too(device: str, capture: Any) -> None:
    policy = policy_on(device)
    act = capturing(GraphedActing(policy), capture)
    steps = []
    for seed in range(4):
        args = inputs(policy, 6, seed)
        before = deepcopy(args)
        step = act(*args)
        with torch.no_grad():
            expected = policy.act(*args)
            torch.testing.assert_close(step.values, expected.values, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(step.core_state, expected.core_state, rtol=1e-4, atol=1e-5)
            distribution, _ = policy.get_distribution(args[0], (args[1],), args[2])
            torch.testing.assert_close(step.log_probs, distribution.log_prob(step.actions), rtol=1e-4, atol=1e-5)
            for parameter in policy.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        torch.testing.assert_close(args, before, rtol=0, atol=0)
        steps.append((step, deepcopy(step)))
    assert not act.disabled
    for step, copied in steps:  # later steps overwrite no earlier result
        torch.testing.assert_close(step, copied, rtol=0, atol=0)


def test_the_capture_lock_is_held_while_actions_are_sampled() -> None:
    policy, acquired = policy_on("cpu"), []

    def capture(work: Callable[[], ActStep]) -> Callable[[], ActStep]:
        def try_the_lock_and_work() -> ActStep:
            thread = Thread(target=lambda: acquired.append(cuda_graphs.CAPTURING.acquire(blocking=False)))
            thread.start()
            thread.join()
            return work()

        return eager_graph(try_the_lock_and_work)

    act = capturing(GraphedActing(policy), capture)
    for seed in range(3):
        act(*inputs(policy, 4, seed))
    assert acquired
    assert not any(acquired)


@devices
def test_every_replay_samples_new_actions(device: str, capture: Any) -> None:
    policy = policy_on(device)
    act = capturing(GraphedActing(policy), capture)
    args = inputs(policy, 64, 0)
    actions = {tuple(act(*args).actions.tolist()) for _ in range(5)}
    assert len(actions) == 5


@devices
def test_a_resumed_run_that_captures_again_samples_the_same_actions(device: str, capture: Any) -> None:
    policy = policy_on(device)
    args = inputs(policy, 64, 0)
    runs = []
    for resumed in (False, True):
        torch.manual_seed(3)
        act = capturing(GraphedActing(policy), capture)
        steps = [act(*args)]
        if resumed:
            act = capturing(GraphedActing(policy), capture)
        steps += [act(*args) for _ in range(3)]
        assert not act.disabled
        runs.append(torch.stack([step.actions for step in steps]))
    assert torch.equal(*runs)


def test_every_number_of_environments_gets_its_own_graph() -> None:
    policy, captured = policy_on("cpu"), []

    def capture(work: Callable[[], ActStep]) -> Callable[[], ActStep]:
        captured.append(work)
        return eager_graph(work)

    act = capturing(GraphedActing(policy), capture)
    for batch in (4, 2, 4, 2):  # two groups of environments, of different sizes
        assert act(*inputs(policy, batch, 0)).values.shape == (batch,)
    assert len(captured) == 2


def test_replaced_weights_are_captured_again() -> None:
    policy, captured = policy_on("cpu"), []

    def capture(work: Callable[[], ActStep]) -> Callable[[], ActStep]:
        captured.append(work)
        result = work()
        first = deepcopy(result)

        def replay() -> ActStep:  # like a graph that reads the memory of the replaced weights
            copy_into(result, first)
            return result

        return replay

    act, args = capturing(GraphedActing(policy), capture), inputs(policy, 4, 0)
    act(*args)
    for parameter in policy.parameters():
        parameter.data = 0.5 * parameter.data
    with torch.no_grad():
        torch.testing.assert_close(act(*args).values, policy.act(*args).values)
    assert len(captured) == 2


def failing(_: Callable[[], ActStep]) -> Callable[[], ActStep]:
    raise RuntimeError("operation not permitted when stream is capturing\nand much more")


def wrong(work: Callable[[], ActStep]) -> Callable[[], ActStep]:
    result = work()._replace(values=torch.full((4,), 7.0))
    return lambda: result


def empty(work: Callable[[], ActStep]) -> Callable[[], ActStep]:
    result = work()  # as if no kernel was launched on the captured stream
    return lambda: result


@pytest.mark.parametrize(
    ("capture", "reason"), [(failing, "not permitted"), (wrong, "its values differ"), (empty, "its values differ")]
)
def test_graphs_are_disabled_if_the_capture_fails_or_its_results_differ(
    capture: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = policy_on("cpu")
    act, args = capturing(GraphedActing(policy), capture), inputs(policy, 4, 0)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(act(*args).values, policy.act(*args).values)
    assert act.disabled
    assert caplog.text.count("acting goes on without CUDA graphs") == 1
    assert reason in caplog.text
    assert "and much more" not in caplog.text


class Generator:
    """A simulated `torch.Generator` whose state can be replaced."""

    def __init__(self, state: str) -> None:
        self.state = state

    def graphsafe_get_state(self) -> "Generator":
        return Generator(self.state)

    def graphsafe_set_state(self, generator: "Generator") -> None:
        self.state = generator.state

    def clone_state(self) -> "Generator":
        return Generator("a copy")


@pytest.mark.parametrize(
    ("error", "draws", "state"),
    [(None, True, "first"), (None, False, "first"), (RuntimeError, True, "a copy"), (RuntimeError, False, "first")],
)
def test_a_failed_capture_leaves_the_generator_that_other_graphs_draw_from(
    error: Any, draws: bool, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, ended_pools = Generator("first"), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: ended_pools.append(args), raising=False)

    def capture() -> None:
        with cuda_graphs._restored_after_failure("pool", draws):
            assert generator.state == ("first" if draws else "a copy")
            if error is not None:
                raise error

    with nullcontext() if error is None else pytest.raises(error):
        capture()
    assert generator.state == state
    assert ended_pools == ([] if error is None else [(0, "pool")])


@pytest.mark.parametrize(
    "space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2), spaces.Box(-1, 1, (2,))], ids=str
)
def test_distributions_do_not_check_their_arguments(space: Any) -> None:
    policy = SRWMPolicy(spaces.Box(-1, 1, (3,)), space, lambda _: 0.0)
    nan = torch.full((4, policy.action_net.out_features), torch.nan)
    distribution = policy.distribution(nan)  # torch's own would raise ValueError
    assert distribution.log_prob(distribution.get_actions()).isnan().all()


@pytest.mark.gpu
def test_acting_has_a_higher_stream_priority_than_learning() -> None:
    policy = policy_on("cuda")
    act = GraphedActing(policy)
    act(*inputs(policy, 16, 0))
    assert act._stream.priority < torch.cuda.current_stream().priority == 0


@pytest.mark.gpu
@pytest.mark.parametrize("draws", [True, False])
def test_a_failed_capture_on_a_gpu_restores_stream_allocator_and_generator(draws: bool) -> None:
    if draws and torch.__version__ < (2, 13):
        pytest.skip("a failed capture leaves the generator's state in capture mode before torch 2.13")
    policy = policy_on("cuda")
    act, args = GraphedActing(policy), inputs(policy, 16, 0)
    act(*args)
    stream, noise = torch.cuda.current_stream(), torch.zeros(8, device="cuda")

    def synchronizing() -> torch.Tensor:
        return noise.normal_() * noise.sum().item()

    with pytest.raises(RuntimeError):
        cuda_graphs.capture(synchronizing, torch.cuda.Stream("cuda"), draws=draws)
    assert torch.cuda.current_stream() == stream
    assert len({tuple(act(*args).actions.tolist()) for _ in range(5)}) > 1  # by the earlier graph
    assert not act.disabled
    with torch.no_grad():
        assert len({tuple(policy.act(*args).actions.tolist()) for _ in range(5)}) > 1  # without graphs
    replay = cuda_graphs.capture(lambda: noise.normal_().clone(), torch.cuda.Stream("cuda"), draws=True)
    assert not torch.equal(replay().clone(), replay())


def test_arguments_are_copied_key_by_key_whatever_the_order_of_a_dict() -> None:
    args = ({"a": torch.ones(2, 1), "b": torch.zeros(2, 3)}, None, 0.5)
    buffers = cuda_graphs.empty_like_args(args, torch.device("cpu"))
    cuda_graphs.copy_into(buffers, ({"b": torch.full((2, 3), 7.0), "a": torch.full((2, 1), 8.0)}, None, 1.5))
    assert buffers[0]["a"].flatten().tolist() == [8.0] * 2
    assert buffers[0]["b"].flatten().tolist() == [7.0] * 6
    assert buffers[1:] == (None, 1.5)
