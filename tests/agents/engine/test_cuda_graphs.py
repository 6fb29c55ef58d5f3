"""Acting through a captured graph: what it gives is what the policy gives, and it is given up where it is not.

Here a graph is stood in for by the same work, done again on the same memory; on a GPU the real one is tested too.
"""

import logging
from collections.abc import Callable
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl.agents.engine import cuda_graphs
from srwm_rl.agents.engine.cuda_graphs import GraphedActing
from srwm_rl.nn.policy import ActStep, SRWMPolicy

SPACE = spaces.Dict({"frame": spaces.Box(0, 255, (8, 8, 3), np.uint8), "seen": spaces.Box(-1, 1, (3,), np.float32)})


def policy_on(device: str) -> SRWMPolicy:
    torch.manual_seed(0)
    cores = {"hidden_size": 16, "n_layers": 2, "n_heads": 2}
    policy = SRWMPolicy(SPACE, spaces.Discrete(5), lambda _: 0.0, core_kwargs=cores, ortho_init=False)
    policy.set_training_mode(False)
    return policy.to(device)


def inputs(policy: SRWMPolicy, batch: int, seed: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frame = torch.randint(256, (batch, 8, 8, 3), generator=generator, dtype=torch.uint8)
    seen = torch.rand(batch, 3, generator=generator)
    state = 0.1 * torch.randn(policy.initial_state(batch).shape, generator=generator)
    starts = (torch.rand(batch, generator=generator) < 0.5).float()
    device = policy.device
    return {"frame": frame.to(device), "seen": seen.to(device)}, state.to(device), starts.to(device)


def again(work: Callable[[], ActStep]) -> Callable[[], ActStep]:
    """Stand in for a graph: the same work on the same memory, its results always in the same tensors."""
    result = work()

    def replay() -> ActStep:
        for kept, made in zip(result, work(), strict=True):
            kept.copy_(made)
        return result

    return replay


def captures() -> list[Any]:
    real = pytest.param("cuda", None, marks=pytest.mark.gpu)
    return [pytest.param("cpu", again), real]


@pytest.mark.parametrize(("device", "capture"), captures())
def test_a_graph_gives_what_the_policy_gives_also_after_it_has_learned(device: str, capture: Any) -> None:
    policy = policy_on(device)
    act = GraphedActing(policy) if capture is None else GraphedActing(policy, capture)
    steps = []
    for seed in range(4):
        given = inputs(policy, 6, seed)
        before = [each.clone() for each in given[0].values()]
        step = act(*given)
        with torch.no_grad():
            expected = policy.act(*given)
            torch.testing.assert_close(step.values, expected.values, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(step.core_state, expected.core_state, rtol=1e-4, atol=1e-5)
            distribution, _ = policy.get_distribution(given[0], (given[1],), given[2])
            torch.testing.assert_close(step.log_probs, distribution.log_prob(step.actions), rtol=1e-4, atol=1e-5)
            for parameter in policy.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        assert all(torch.equal(one, other) for one, other in zip(before, given[0].values(), strict=True))
        steps.append((step, ActStep(*(each.clone() for each in step))))
    assert not act.disabled
    for step, copied in steps:  # later steps write over none of these
        assert all(torch.equal(one, other) for one, other in zip(step, copied, strict=True))


def test_nobody_captures_while_actions_are_drawn() -> None:
    policy, free = policy_on("cpu"), []

    def look() -> None:
        free.append(cuda_graphs.CAPTURING.acquire(blocking=False))

    def watched(work: Callable[[], ActStep]) -> Callable[[], ActStep]:
        def looked() -> ActStep:
            other = Thread(target=look)
            other.start()
            other.join()
            return work()

        return again(looked)

    act = GraphedActing(policy, watched)
    for seed in range(3):
        act(*inputs(policy, 4, seed))
    assert free
    assert not any(free)


@pytest.mark.parametrize(("device", "capture"), captures())
def test_actions_are_drawn_anew_each_time(device: str, capture: Any) -> None:
    policy = policy_on(device)
    act = GraphedActing(policy) if capture is None else GraphedActing(policy, capture)
    given = inputs(policy, 64, 0)
    drawn = {tuple(act(*given).actions.tolist()) for _ in range(5)}
    assert len(drawn) == 5


@pytest.mark.parametrize(("device", "capture"), captures())
def test_a_resumed_run_which_captures_anew_draws_what_it_would_have_drawn(device: str, capture: Any) -> None:
    policy = policy_on(device)
    given = inputs(policy, 64, 0)
    runs = []
    for resumed in (False, True):
        torch.manual_seed(3)
        act = GraphedActing(policy) if capture is None else GraphedActing(policy, capture)
        steps = [act(*given)]
        if resumed:
            act = GraphedActing(policy) if capture is None else GraphedActing(policy, capture)
        steps += [act(*given) for _ in range(3)]
        assert not act.disabled
        runs.append(torch.stack([each.actions for each in steps]))
    assert torch.equal(*runs)


def test_another_number_of_environments_gets_a_graph_of_its_own() -> None:
    policy, made = policy_on("cpu"), []

    def counted(work: Callable[[], ActStep]) -> Callable[[], ActStep]:
        made.append(work)
        return again(work)

    act = GraphedActing(policy, counted)
    for batch in (4, 2, 4, 2):  # two groups of environments, of different sizes
        assert act(*inputs(policy, batch, 0)).values.shape == (batch,)
    assert len(made) == 2


def test_weights_that_were_moved_get_a_graph_of_their_own() -> None:
    policy, made = policy_on("cpu"), []

    def stale_later(work: Callable[[], ActStep]) -> Callable[[], ActStep]:
        made.append(work)
        result = work()
        kept = ActStep(*(each.clone() for each in result))

        def replay() -> ActStep:  # as a graph that reads where the weights were
            return ActStep(*(each.copy_(before) for each, before in zip(result, kept, strict=True)))

        return replay

    act, given = GraphedActing(policy, stale_later), inputs(policy, 4, 0)
    act(*given)
    for each in policy.parameters():
        each.data = 0.5 * each.data
    with torch.no_grad():
        torch.testing.assert_close(act(*given).values, policy.act(*given).values)
    assert len(made) == 2


def fails(_: Callable[[], ActStep]) -> Callable[[], ActStep]:
    raise RuntimeError("operation not permitted when stream is capturing\nand much more")


def stale(work: Callable[[], ActStep]) -> Callable[[], ActStep]:
    wrong = work()._replace(values=torch.full((4,), 7.0))
    return lambda: wrong


def idle(work: Callable[[], ActStep]) -> Callable[[], ActStep]:
    done = work()  # as where nothing of it was on the stream that was captured
    return lambda: done


@pytest.mark.parametrize(
    ("capture", "why"), [(fails, "not permitted"), (stale, "its values differ"), (idle, "its values differ")]
)
def test_a_graph_that_fails_or_is_wrong_is_given_up(capture: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_on("cpu")
    act, given = GraphedActing(policy, capture), inputs(policy, 4, 0)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(act(*given).values, policy.act(*given).values)
    assert act.disabled
    assert caplog.text.count("acting goes on without a CUDA graph") == 1
    assert why in caplog.text
    assert "and much more" not in caplog.text


class Generator:
    """A generator of random numbers whose state can be changed for another."""

    def __init__(self, state: str) -> None:
        self.state = state

    def graphsafe_get_state(self) -> "Generator":
        return Generator(self.state)

    def graphsafe_set_state(self, other: "Generator") -> None:
        self.state = other.state

    def clone_state(self) -> "Generator":
        return Generator("a copy")


@pytest.mark.parametrize(
    ("error", "draws", "state"),
    [(None, True, "first"), (None, False, "first"), (RuntimeError, True, "a copy"), (RuntimeError, False, "first")],
)
def test_what_a_failed_capture_may_spoil_is_not_what_graphs_draw_from(
    error: Any, draws: bool, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, ended = Generator("first"), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: ended.append(given), raising=False)

    def captured() -> None:
        with cuda_graphs._restored_after_failure("pool", draws):
            assert generator.state == ("first" if draws else "a copy")
            if error is not None:
                raise error

    if error is None:
        captured()
    else:
        with pytest.raises(error):
            captured()
    assert generator.state == state
    assert ended == ([] if error is None else [(0, "pool")])


@pytest.mark.parametrize(
    "space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2), spaces.Box(-1, 1, (2,))], ids=str
)
def test_no_distribution_waits_for_a_check_of_its_arguments(space: Any) -> None:
    policy = SRWMPolicy(spaces.Box(-1, 1, (3,)), space, lambda _: 0.0)
    nan = torch.full((4, policy.action_net.out_features), torch.nan)
    distribution = policy.distribution(nan)  # torch's own would raise ValueError
    assert distribution.log_prob(distribution.get_actions()).isnan().all()


@pytest.mark.gpu
def test_acting_goes_before_learning() -> None:
    policy = policy_on("cuda")
    act = GraphedActing(policy)
    act(*inputs(policy, 16, 0))
    assert act._stream.priority < torch.cuda.current_stream().priority == 0


@pytest.mark.gpu
@pytest.mark.parametrize("draws", [True, False])
def test_a_capture_that_fails_leaves_a_gpu_as_it_was(draws: bool) -> None:
    policy = policy_on("cuda")
    act, given = GraphedActing(policy), inputs(policy, 16, 0)
    act(*given)
    stream, noise = torch.cuda.current_stream(), torch.zeros(8, device="cuda")

    def waits() -> torch.Tensor:
        return noise.normal_() * noise.sum().item()

    with pytest.raises(RuntimeError):
        cuda_graphs.capture(waits, torch.cuda.Stream("cuda"), draws=draws)
    assert torch.cuda.current_stream() == stream
    assert len({tuple(act(*given).actions.tolist()) for _ in range(5)}) > 1  # by the graph there was
    assert not act.disabled
    with torch.no_grad():
        assert len({tuple(policy.act(*given).actions.tolist()) for _ in range(5)}) > 1  # and without
    replay = cuda_graphs.capture(lambda: noise.normal_().clone(), torch.cuda.Stream("cuda"), draws=True)
    assert not torch.equal(replay().clone(), replay())
