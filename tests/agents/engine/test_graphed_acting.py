"""Acting by captured CUDA graphs: they give the policy's results, and are disabled where they do not.

On a CPU `eager_graph` stands in for the graph; tests marked `gpu` capture real ones.
"""

import logging
import math
from collections.abc import Callable
from copy import deepcopy
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl.agents.collecting.rollout_buffer import storage
from srwm_rl.agents.engine import cuda_graphs
from srwm_rl.agents.engine.graphed_acting import GraphedActing, GraphedActor, as_words
from srwm_rl.nn.policy import ActStep, SRWMPolicy
from tests.agents.probe import capturing, eager_graph

SPACE = spaces.Dict({"frame": spaces.Box(0, 255, (8, 8, 3), np.uint8), "vector": spaces.Box(-1, 1, (3,), np.float32)})
T = 4
Args = tuple[dict[str, np.ndarray], torch.Tensor, np.ndarray]


def policy_on(device: str) -> SRWMPolicy:
    torch.manual_seed(0)
    cores = {"hidden_size": 16, "n_layers": 2, "n_heads": 2}
    policy = SRWMPolicy(SPACE, spaces.Discrete(5), lambda _: 0.0, core_kwargs=cores, ortho_init=False)
    policy.set_training_mode(False)
    return policy.to(device)


def acting_of(policy: SRWMPolicy, capture: Any = None) -> GraphedActing:
    return capturing(GraphedActing(policy, lambda: None), capture)


def inputs(policy: SRWMPolicy, batch: int, seed: int) -> Args:
    """Return observations, a core state and episode starts."""
    generator = np.random.default_rng(seed)
    obs = {
        "frame": generator.integers(256, size=(batch, 8, 8, 3), dtype=np.uint8),
        "vector": generator.random((batch, 3), np.float32),
    }
    state = 0.1 * generator.standard_normal(policy.initial_state(batch).shape, np.float32)
    return obs, torch.from_numpy(state).to(policy.device), generator.random(batch) < 0.5


def on_device(policy: SRWMPolicy, args: Args) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return arguments of `SRWMPolicy.act`."""
    obs, state, starts = args
    device = policy.device
    return {key: torch.tensor(x, device=device) for key, x in obs.items()}, state, torch.tensor(starts, device=device)


def begin(acting: GraphedActing, policy: SRWMPolicy, args: Args, first: int = 0) -> GraphedActor:
    """Begin a rollout of T steps."""
    return acting.actor(first, storage((T, len(args[2])), SPACE, policy.device), T + 1, *args)


devices = pytest.mark.parametrize(
    ("device", "capture"), [("cpu", eager_graph), pytest.param("cuda", None, marks=pytest.mark.gpu)]
)


@devices
def test_a_graph_gives_the_policys_results_after_the_weights_have_changed_too(device: str, capture: Any) -> None:
    policy = policy_on(device)
    acting = acting_of(policy, capture)
    steps = []
    for seed in range(4):
        args = inputs(policy, 6, seed)
        before = deepcopy(args)
        actor = begin(acting, policy, args)
        step = actor(seed, *args)
        obs, state, starts = on_device(policy, args)
        with torch.no_grad():
            expected = policy.act(obs, state, starts)
            torch.testing.assert_close(step.values, expected.values.cpu(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(step.core_state, expected.core_state, rtol=1e-4, atol=1e-5)
            distribution, _ = policy.get_distribution(obs, (state,), starts)
            log_probs = distribution.log_prob(step.actions.to(device)).cpu()
            torch.testing.assert_close(step.log_probs, log_probs, rtol=1e-4, atol=1e-5)
            for parameter in policy.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        np.testing.assert_equal(args[0], before[0])
        assert torch.equal(args[1], before[1])
        steps.append((step[:3], deepcopy(step[:3])))
    assert not acting.disabled
    for step, copied in steps:  # later steps overwrite no earlier result
        torch.testing.assert_close(step, copied, rtol=0, atol=0)


@devices
def test_a_core_state_goes_from_step_to_step_and_outlives_the_next_one(device: str, capture: Any) -> None:
    policy = policy_on(device)
    args = inputs(policy, 6, 0)
    actor, (_, state, _) = begin(acting_of(policy, capture), policy, args), args
    expected, kept = state, []
    for t in range(T):
        obs, _, starts = inputs(policy, 6, t)
        for result, copy in kept[-1:]:
            assert torch.equal(result, copy)
        state = actor(t, obs, state, starts).core_state
        for result, copy in kept[-1:]:
            assert torch.equal(result, copy)
        kept.append((state, state.clone()))
        with torch.no_grad():
            expected = policy.act(*on_device(policy, (obs, expected, starts))).core_state
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)
    assert {id(result) for result, _ in kept} == {id(state) for state in actor.core_states}


@devices
def test_the_graph_stores_the_observations_of_its_step(device: str, capture: Any) -> None:
    policy = policy_on(device)
    args = [inputs(policy, 6, t) for t in range(T + 1)]
    actor = begin(acting_of(policy, capture), policy, args[3])
    for t in range(T):
        actor(t, *args[t])
    actor.store(T, args[T][0])
    for key, stored in actor.observations.items():  # type: ignore[union-attr]
        np.testing.assert_array_equal(stored.cpu().numpy(), np.stack([obs[key] for obs, *_ in args]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.uint16, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (4, 2), (3, 8, 1)])
def test_memory_as_words_is_the_same_memory(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.arange(math.prod(shape)).view(shape)[:, None].to(dtype)
    words, copy = as_words(tensor), torch.zeros_like(tensor)
    as_words(copy).index_copy_(0, torch.arange(len(tensor)), words)
    assert torch.equal(copy, tensor)
    assert words.data_ptr() == tensor.data_ptr()
    n_bytes = tensor[0].nbytes
    assert words.shape == (len(tensor), n_bytes // 8 if n_bytes % 8 == 0 else n_bytes)


def test_the_capture_lock_is_held_while_actions_are_sampled() -> None:
    policy, acquired = policy_on("cpu"), []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        def try_the_lock_and_work() -> None:
            thread = Thread(target=lambda: acquired.append(cuda_graphs.CAPTURING.acquire(blocking=False)))
            thread.start()
            thread.join()
            work()

        return eager_graph(try_the_lock_and_work)

    args = inputs(policy, 4, 0)
    actor = begin(acting_of(policy, capture), policy, args)
    n_captures = len(acquired)
    for t in range(3):
        actor(t, *args)
    assert len(acquired) == n_captures + 3
    assert n_captures > 0
    assert not any(acquired)


@devices
def test_every_replay_samples_new_actions(device: str, capture: Any) -> None:
    policy = policy_on(device)
    args = inputs(policy, 64, 0)
    actor = begin(acting_of(policy, capture), policy, args)
    assert len({tuple(actor(0, *args).actions.tolist()) for _ in range(5)}) == 5


@devices
def test_a_resumed_run_that_captures_again_samples_the_same_actions(device: str, capture: Any) -> None:
    policy = policy_on(device)
    args = inputs(policy, 64, 0)
    runs = []
    for resumed in (False, True):
        torch.manual_seed(3)
        acting = acting_of(policy, capture)
        steps = [begin(acting, policy, args)(0, *args)]
        if resumed:
            acting = acting_of(policy, capture)
        actor = begin(acting, policy, args)
        steps += [actor(t, *args) for t in range(3)]
        assert not acting.disabled
        runs.append(torch.stack([step.actions for step in steps]))
    assert torch.equal(*runs)


class Captures:
    """Counts captures."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.n += 1
        return eager_graph(work)


def test_every_group_has_its_own_graphs() -> None:
    policy, captures = policy_on("cpu"), Captures()
    acting = acting_of(policy, captures)
    args = [inputs(policy, batch, batch) for batch in (4, 2)]
    for _ in range(2):
        actors = [begin(acting, policy, group_args, first) for first, group_args in zip((0, 4), args, strict=True)]
        steps = [actor(0, *group_args) for actor, group_args in zip(actors, args, strict=True)]
        assert [step.values.shape for step in steps] == [(4,), (2,)]
    assert captures.n == 4  # one for each of the two core states
    for batch, n_captures in ((3, 6), (3, 6), (4, 8)):  # other environments
        group_args = inputs(policy, batch, 0)
        assert begin(acting, policy, group_args)(0, *group_args).values.shape == (batch,)
        assert captures.n == n_captures
    acting.actor(0, storage((9, 4), SPACE, policy.device), 10, *args[0])  # longer rollouts
    assert captures.n == 10


def test_replaced_weights_are_captured_again_in_the_next_rollout_once_the_learner_waits() -> None:
    policy, events = policy_on("cpu"), []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        events.append("capture")
        return eager_graph(work)

    acting = capturing(GraphedActing(policy, lambda: events.append("the learner waits")), capture)
    args = inputs(policy, 4, 0)
    for _ in range(2):
        begin(acting, policy, args)
    assert events == ["the learner waits", "capture", "capture"]
    for parameter in policy.parameters():
        parameter.data = 0.5 * parameter.data
    step = begin(acting, policy, args)(0, *args)
    assert events == 2 * ["the learner waits", "capture", "capture"]
    with torch.no_grad():
        torch.testing.assert_close(step.values, policy.act(*on_device(policy, args)).values)


def failing(_: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing\nand much more")


def empty(work: Callable[[], None]) -> Callable[[], None]:
    work()  # as if no kernel was launched on the captured stream
    return lambda: None


@pytest.mark.parametrize(("capture", "reason"), [(failing, "not permitted"), (empty, "its values differ")])
def test_graphs_are_disabled_if_the_capture_fails_or_its_results_differ(
    capture: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = policy_on("cpu")
    acting, args = acting_of(policy, capture), inputs(policy, 4, 0)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for t in range(3):
            step = begin(acting, policy, args)(t, *args)
            expected = policy.act(*on_device(policy, args))
            torch.testing.assert_close(step.values, expected.values)
            torch.testing.assert_close(step.core_state, expected.core_state)
    assert acting.disabled
    assert caplog.text.count("acting goes on without CUDA graphs") == 1
    assert reason in caplog.text
    assert "and much more" not in caplog.text


@pytest.mark.parametrize("result", ["values", "core_state"])
def test_graphs_are_disabled_if_a_result_is_wrong(result: str, caplog: pytest.LogCaptureFixture) -> None:
    policy, act = policy_on("cpu"), SRWMPolicy.act
    args, wrong = inputs(policy, 4, 0), False

    def once_wrong(*step_args: Any) -> ActStep:
        step = act(policy, *step_args)
        return step._replace(**{result: getattr(step, result) + 7}) if wrong else step

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            nonlocal wrong
            wrong = True
            work()
            wrong = False

        return replay

    policy.act = once_wrong  # type: ignore[method-assign, assignment]
    begin(acting_of(policy, capture), policy, args)
    assert f"its {result} differ from those of the policy" in caplog.text


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
    acting = acting_of(policy)
    begin(acting, policy, inputs(policy, 16, 0))
    assert acting._stream.priority < torch.cuda.current_stream().priority == 0


@pytest.mark.gpu
@pytest.mark.parametrize("draws", [True, False])
def test_a_failed_capture_on_a_gpu_restores_stream_allocator_and_generator(draws: bool) -> None:
    if draws and torch.__version__ < (2, 13):
        pytest.skip("a failed capture leaves the generator's state in capture mode before torch 2.13")
    policy = policy_on("cuda")
    acting, args = acting_of(policy), inputs(policy, 16, 0)
    actor = begin(acting, policy, args)
    stream, noise = torch.cuda.current_stream(), torch.zeros(8, device="cuda")

    def synchronizing() -> torch.Tensor:
        return noise.normal_() * noise.sum().item()

    with pytest.raises(RuntimeError):
        cuda_graphs.capture(synchronizing, torch.cuda.Stream("cuda"), draws=draws)
    assert torch.cuda.current_stream() == stream
    assert len({tuple(actor(0, *args).actions.tolist()) for _ in range(5)}) > 1  # by the earlier graph
    assert not acting.disabled
    with torch.no_grad():
        tensors = on_device(policy, args)
        assert len({tuple(policy.act(*tensors).actions.tolist()) for _ in range(5)}) > 1  # without graphs
    replay = cuda_graphs.capture(lambda: noise.normal_().clone(), torch.cuda.Stream("cuda"), draws=True)
    assert not torch.equal(replay().clone(), replay())
