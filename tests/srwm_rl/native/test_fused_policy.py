"""The policy in C has the results and gradients of the policy in torch, and is disabled where it differs."""

import logging
import pickle
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from srwm_rl.native.fused_policy import FusedPolicy, UnsupportedModuleError, lower
from srwm_rl.nn.cnns import ImpalaCNN
from srwm_rl.nn.layers import FeedForwardBlock
from srwm_rl.nn.policy import ActStep, Obs, SRWMPolicy
from srwm_rl.ops import cpu
from srwm_rl.ops.backends import prefer

pytestmark = pytest.mark.skipif(isinstance(cpu.load_kernel(), str), reason=str(cpu.load_kernel()))

LONE = spaces.Box(-1, 1, (3,), np.float32)
PAST = {
    "previous_action": spaces.Box(0, 1, (5,), np.float32),
    "previous_reward": spaces.Box(-1, 1, (1,), np.float32),
    "episode_step": spaces.Box(0, np.inf, (1,), np.float32),
}
MANY = spaces.Dict(
    {"seen": spaces.Box(-1, 1, (2, 2), np.float64), "kind": spaces.Discrete(3), "bits": spaces.MultiBinary(2), **PAST}
)
FRAMES = spaces.Box(0, 255, (16, 16, 3), np.uint8)
TWO_CAMERAS = spaces.Dict({"left": FRAMES, "right": spaces.Box(0, 255, (3, 12, 16), np.uint8), **MANY.spaces})
SMALL_CNN = {"cnn": {"channels": (4, 8), "features": 12, "micro_batch": 16}}
ACTIONS = {
    "discrete": spaces.Discrete(5),
    "box": spaces.Box(-1, 1, (2,), np.float32),
    "multi": spaces.MultiDiscrete([3, 4]),
    "bits": spaces.MultiBinary(3),
}
CORES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("srwm", {}),
    "two layers": ("srwm", {"n_layers": 2}),
    "published": ("srwm", {"n_layers": 2, "variant": "paper"}),
    "residual norm": ("srwm", {"norm": "residual", "n_layers": 2}),
    "retention": ("srwm", {"retention": True}),
    "bound": ("srwm", {"shift_bound": 2.0, "n_layers": 2}),
    "both": ("srwm", {"shift_bound": 2.0, "retention": True, "input_softmax": True}),
    "frozen": ("srwm", {"frozen": "query"}),
    "sr_delta": ("sr_delta", {}),
    "delta": ("delta", {"n_layers": 2}),
    "fake_sr": ("fake_sr", {}),
    "conv": ("srwm", {"short_conv": 4}),
    "conv, two layers": ("srwm", {"short_conv": 3, "n_layers": 2, "retention": True}),
    "conv of delta": ("delta", {"short_conv": 2, "n_layers": 2}),
    "conv of fake_sr": ("fake_sr", {"short_conv": 4, "n_layers": 2}),
}


def policy_of(
    core: str = "default", space: spaces.Space[Any] = MANY, action: str = "discrete", **settings: Any
) -> SRWMPolicy:
    torch.manual_seed(0)
    name, kwargs = CORES[core]
    sizes = {"n_layers": 1, **kwargs, "hidden_size": 16, "n_heads": 2}
    policy = SRWMPolicy(space, ACTIONS[action], lambda _: 0.0, core=name, core_kwargs=sizes, **settings)
    with torch.no_grad():
        for parameter in policy.parameters():  # away from zeros and from the small head
            parameter.add_(0.1 * torch.randn_like(parameter))
    policy.set_training_mode(False)
    return policy


def unroll(policy: SRWMPolicy, n_steps: int, batch: int) -> tuple[Obs, Tensor, Tensor, Tensor]:
    """Draw observations `[T, B, ...]`, actions, a core state and episode starts."""
    rng = np.random.default_rng(0)
    drawn = {}
    for key, space in policy.obs_spaces.items():
        space.seed(0)
        samples = np.stack([space.sample() for _ in range(n_steps * batch)])
        if key == "episode_step":
            samples = rng.integers(0, 200, samples.shape).astype(np.float32)
        drawn[key] = torch.as_tensor(samples.reshape(n_steps, batch, *samples.shape[1:]))
    policy.action_space.seed(0)
    played = np.stack([policy.action_space.sample() for _ in range(n_steps * batch)])
    actions = torch.as_tensor(played.reshape(n_steps, batch, *played.shape[1:]))
    state = 0.1 * torch.randn(policy.initial_state(batch).shape)
    starts = torch.as_tensor(rng.random((n_steps, batch)) < 0.2)
    obs: Obs = drawn if isinstance(policy.observation_space, spaces.Dict) else drawn["observation"]
    return obs, actions, state, starts


def first(obs: Obs) -> Obs:
    return {key: tensor[0] for key, tensor in obs.items()} if isinstance(obs, dict) else obs[0]


def check_act(policy: SRWMPolicy, fused: FusedPolicy, batch: int) -> ActStep:
    """Act in C and in torch from one generator state, and compare."""
    obs, _, state, starts = unroll(policy, 1, batch)
    arguments = (first(obs), state, starts[0])
    torch.manual_seed(1)
    actual = fused.act(*arguments)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = policy.act(*arguments)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    return actual


def check_sequence(policy: SRWMPolicy, fused: FusedPolicy, n_steps: int, batch: int, bptt: int | None = None) -> None:
    """Evaluate in C and in torch; compare results and gradients."""
    obs, actions, state, starts = unroll(policy, n_steps, batch)
    results = []
    for implementation in (fused, policy):
        result = implementation.evaluate_sequence(obs, actions, state, starts, bptt)
        policy.zero_grad()
        (result.values.square().sum() + result.log_probs.sum() + 0.3 * result.entropy.sum()).backward()
        results.append([*result, *(p.grad for p in policy.parameters() if p.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm() + 1e-6


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("batch", [1, 70])
def test_every_core(core: str, batch: int) -> None:
    policy = policy_of(core)
    fused = FusedPolicy(policy)
    check_act(policy, fused, batch)
    check_sequence(policy, fused, 9, batch)
    check_sequence(policy, fused, 9, batch, bptt=4)
    assert not fused.disabled
    assert (fused._lowered.step is not None) == (CORES[core][0] == "srwm" and core != "frozen")


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("space", [LONE, MANY], ids=["lone", "many"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"net_arch": {"pi": [8, 7], "vf": [9]}},
        {"net_arch": [8], "activation_fn": "relu"},
        {"encoder_kwargs": {"mlp": ()}},
        {"encoder_kwargs": {"mlp": (12, 10)}},
    ],
    ids=["plain", "two towers", "relu", "no mlp", "deep mlp"],
)
def test_every_space_and_head(space: spaces.Space[Any], action: str, settings: dict[str, Any]) -> None:
    policy = policy_of("two layers", space, action, **settings)
    fused = FusedPolicy(policy)
    check_act(policy, fused, 5)
    check_sequence(policy, fused, 6, 5)
    assert not fused.disabled


@pytest.mark.parametrize("action", ["discrete", "box"])
@pytest.mark.parametrize("space", [FRAMES, TWO_CAMERAS], ids=["frames", "two cameras"])
@pytest.mark.parametrize("mlp", [(), (9,), (12, 10)], ids=["no mlp", "mlp", "deep mlp"])
def test_image_features_of_torch_are_inputs_of_the_programs(
    space: spaces.Space[Any], action: str, mlp: tuple[int, ...]
) -> None:
    policy = policy_of("two layers", space, action, encoder_kwargs={"mlp": mlp, **SMALL_CNN})
    fused = FusedPolicy(policy)
    check_act(policy, fused, 5)
    check_sequence(policy, fused, 6, 5, bptt=4)
    check_sequence(policy, fused, 6, 15)
    assert not fused.disabled
    for network in policy.features_extractor.images.values():
        network.requires_grad_(False)
    check_sequence(policy, fused, 6, 5)
    assert not fused.disabled


@pytest.mark.parametrize("space", [LONE, FRAMES], ids=["lone", "frames"])
def test_gradients_do_not_depend_on_threads(space: spaces.Space[Any]) -> None:
    policy = policy_of("default", space, encoder_kwargs={} if space is LONE else SMALL_CNN)
    obs, actions, state, starts = unroll(policy, 70, 40)  # 2,800 rows: several shares
    gradients = []
    try:
        for n in (1, 3):
            cpu.set_threads(n)
            seen = FusedPolicy(policy).evaluate_sequence(obs, actions, state, starts)
            policy.zero_grad()
            (seen.values.sum() + seen.log_probs.sum()).backward()
            gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    finally:
        cpu.set_threads(None)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_weights_are_read_in_place_and_moved_ones_lowered_again() -> None:
    policy = policy_of()
    fused = FusedPolicy(policy)
    check_act(policy, fused, 3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    check_act(policy, fused, 3)
    old = fused._lowered
    assert old is not None
    for parameter in policy.parameters():
        parameter.data = parameter.data.clone() * 0.9
    check_act(policy, fused, 3)
    assert fused._lowered not in (None, old)


def test_actions_are_sampled_as_the_policy_samples_them() -> None:
    policy = policy_of()
    fused = FusedPolicy(policy)
    obs, _, state, starts = unroll(policy, 1, 64)
    arguments = (first(obs), state, starts[0])
    torch.manual_seed(3)
    actual = torch.stack([fused.act(*arguments).actions for _ in range(20)])
    torch.manual_seed(3)
    with torch.no_grad():
        expected = torch.stack([policy.act(*arguments).actions for _ in range(20)])
    assert not fused.disabled
    assert (actual == expected).float().mean() > 0.99  # rounding may decide near ties
    assert len(actual.unique(dim=0)) == 20


def test_a_weight_changed_before_backward_raises() -> None:
    policy = policy_of()
    obs, actions, state, starts = unroll(policy, 3, 2)
    fused = FusedPolicy(policy)
    seen = fused.evaluate_sequence(obs, actions, state, starts)
    assert not fused.disabled
    with torch.no_grad():
        policy.value_net.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        seen.values.sum().backward()


def test_nan_stays_in_its_environment_and_is_not_hidden() -> None:
    policy = policy_of("default", LONE)
    fused = FusedPolicy(policy)
    obs, actions, state, starts = unroll(policy, 2, 4)
    obs[0, 1, 2] = torch.nan
    step = fused.act(obs[0], state, starts[0])
    assert torch.isfinite(step.log_probs).tolist() == [True, False, True, True]
    assert torch.isfinite(step.values).tolist() == [True, False, True, True]
    seen = fused.evaluate_sequence(obs, actions, state, starts)
    assert torch.isfinite(seen.values[0]).tolist() == [True, False, True, True]
    assert not fused.disabled


@pytest.mark.parametrize("core", ["lstm", "gru", "feedforward", "srwm_no_carry"])
def test_other_cores_run_in_torch(core: str) -> None:
    torch.manual_seed(0)
    policy = SRWMPolicy(LONE, ACTIONS["discrete"], lambda _: 0.0, core=core)
    fused = FusedPolicy(policy)
    check_act(policy, fused, 3)
    check_sequence(policy, fused, 4, 3)
    assert fused.disabled
    with pytest.raises(UnsupportedModuleError):
        lower(policy)


class OtherCNN(ImpalaCNN):
    """A subclass of the supported CNN."""


def other_cnn(policy: SRWMPolicy) -> None:
    policy.features_extractor.images["left"].__class__ = OtherCNN


def smooth(policy: SRWMPolicy) -> None:
    policy.features_extractor.mlp = nn.Sequential(nn.Linear(9, 64), nn.GELU())


def rectified_first(policy: SRWMPolicy) -> None:
    policy.features_extractor.mlp = nn.Sequential(nn.ReLU(), nn.Linear(9, 64))


def rectified_twice(policy: SRWMPolicy) -> None:
    policy.features_extractor.mlp = nn.Sequential(nn.Linear(9, 64), nn.Tanh(), nn.ReLU())


@pytest.mark.parametrize("change", [other_cnn, smooth, rectified_first, rectified_twice])
def test_unsupported_encoders_run_in_torch(change: Any) -> None:
    policy = policy_of("default", TWO_CAMERAS, encoder_kwargs=SMALL_CNN)
    lower(policy)
    change(policy)
    fused = FusedPolicy(policy)
    check_act(policy, fused, 3)
    assert fused.disabled


class Doubling(FeedForwardBlock):
    """A block whose forward differs from its parent's."""

    def forward(self, x: Tensor) -> Tensor:
        """Double."""
        return 2 * super().forward(x)


def test_a_policy_whose_results_differ_runs_in_torch_with_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of("default", LONE)
    policy.core.blocks[0].__class__ = Doubling
    with pytest.raises(UnsupportedModuleError):
        lower(policy)
    policy.core.blocks[0].__class__ = FeedForwardBlock
    forward = FeedForwardBlock.forward
    monkeypatch.setattr(FeedForwardBlock, "forward", lambda self, x: 2 * forward(self, x))  # the type is unchanged
    fused = FusedPolicy(policy)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check_act(policy, fused, 3)
    assert fused.disabled
    assert caplog.text.count("runs without its C kernel, whose log-probabilities differ") == 1


def assign(policy: SRWMPolicy) -> None:
    policy.load_state_dict({name: 1.5 * weight for name, weight in policy.state_dict().items()}, assign=True)


def replace_head(policy: SRWMPolicy) -> None:
    policy.value_net = nn.Linear(16, 1)


def move(policy: SRWMPolicy) -> None:
    policy.load_from_vector(0.5 * policy.parameters_to_vector())


def turn(policy: SRWMPolicy) -> None:
    policy.core.project.weight.data = policy.core.project.weight.data.flip(0).t().contiguous().t()


def grow(policy: SRWMPolicy) -> None:
    policy.mlp_extractor.policy_net.append(nn.Linear(16, 16))


@pytest.mark.parametrize("change", [assign, replace_head, move, turn, grow])
def test_a_replaced_weight_or_module_is_lowered_again(change: Any) -> None:
    policy = policy_of("default", LONE)
    fused = FusedPolicy(policy)
    check_act(policy, fused, 3)
    check_sequence(policy, fused, 3, 2)
    change(policy)
    check_act(policy, fused, 3)
    check_sequence(policy, fused, 3, 2)
    assert fused.disabled == (change is turn)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("of", ["value_net", "features_extractor.images"])
def test_hooks_are_called(kind: str, of: str) -> None:
    policy, calls = policy_of("default", FRAMES, encoder_kwargs=SMALL_CNN), []
    hooked = policy.value_net if of == "value_net" else policy.features_extractor.images["observation"]
    fused = FusedPolicy(policy)
    check_sequence(policy, fused, 3, 2)
    hook = getattr(hooked, f"register_{kind}_hook")(lambda *_: calls.append(1))
    check_sequence(policy, fused, 3, 2)
    assert len(calls) == 2  # once per implementation
    hook.remove()
    check_sequence(policy, fused, 3, 2)
    assert not fused.disabled


def lora(policy: SRWMPolicy) -> None:
    class Adapted(nn.Linear):
        pass

    policy.core.layers[0].out.__class__ = Adapted


def plain_norm(policy: SRWMPolicy) -> None:
    policy.core.blocks[0].layer_norm = nn.LayerNorm(16, elementwise_affine=False)


def weight_norm(policy: SRWMPolicy) -> None:
    nn.utils.parametrizations.weight_norm(policy.value_net)


def forgetful(policy: SRWMPolicy) -> None:
    policy.core.carries_over = False


@pytest.mark.parametrize("change", [lora, plain_norm, weight_norm, forgetful])
def test_subclassed_or_parametrized_modules_run_in_torch(change: Any) -> None:
    policy = policy_of("default", LONE)
    change(policy)
    fused = FusedPolicy(policy)
    check_act(policy, fused, 3)
    check_sequence(policy, fused, 3, 2)
    assert fused.disabled


def test_empty_batches_and_frozen_weights() -> None:
    policy = policy_of("default", LONE)
    fused = FusedPolicy(policy)
    obs, actions, state, starts = unroll(policy, 2, 3)
    assert fused.act(obs[0, :0], state[:, :0], starts[0, :0]).values.shape == (0,)
    assert fused.evaluate_sequence(obs[:, :0], actions[:, :0], state[:, :0], starts[:, :0]).values.shape == (2, 0)
    policy.core.requires_grad_(False)
    check_sequence(policy, fused, 3, 2)
    policy.requires_grad_(False)
    assert not fused.evaluate_sequence(obs, actions, state, starts).values.requires_grad


@pytest.mark.parametrize("space", [LONE, FRAMES], ids=["lone", "frames"])
def test_observations_that_require_a_gradient_get_it(space: spaces.Space[Any]) -> None:
    policy = policy_of("default", space, encoder_kwargs={} if space is LONE else SMALL_CNN)
    obs, actions, state, starts = unroll(policy, 2, 3)
    assert isinstance(obs, Tensor)
    obs = obs.float()
    grads = []
    for module in (FusedPolicy(policy), policy):
        seen = obs.clone().requires_grad_()
        grads += torch.autograd.grad(module.evaluate_sequence(seen, actions, state, starts).values.sum(), seen)
    assert grads[0].norm() > 0
    torch.testing.assert_close(*grads)


def test_comparing_draws_no_random_numbers_and_copies_work() -> None:
    policy = policy_of("default", LONE)
    obs, actions, state, starts = unroll(policy, 2, 3)
    fused, before = FusedPolicy(policy), torch.get_rng_state()
    fused.evaluate_sequence(obs, actions, state, starts)
    assert torch.equal(torch.get_rng_state(), before)
    for copied in (deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        check_act(copied.policy, copied, 3)
        assert copied.policy is not policy


def test_replaced_methods_are_called() -> None:
    policy = policy_of("default", LONE)
    fused = FusedPolicy(policy)
    obs, actions, state, starts = unroll(policy, 3, 2)
    before = fused.evaluate_sequence(obs, actions, state, starts)
    own = policy.evaluate_sequence
    policy.evaluate_sequence = lambda *args: own(*args)._replace(values=torch.zeros(3, 2))  # type: ignore[method-assign]
    assert fused.evaluate_sequence(obs, actions, state, starts).values.eq(0).all()
    del policy.evaluate_sequence
    assert torch.equal(fused.evaluate_sequence(obs, actions, state, starts).values, before.values)


class NoOpPolicy(SRWMPolicy):
    """A subclass that overrides `act`."""

    def act(self, obs: Obs, core_state: Tensor, episode_starts: Tensor, deterministic: bool = False) -> ActStep:
        """Do nothing."""
        step = super().act(obs, core_state, episode_starts, deterministic)
        return step._replace(actions=torch.zeros_like(step.actions))


def test_a_subclass_with_its_own_act_is_respected() -> None:
    policy = NoOpPolicy(LONE, ACTIONS["discrete"], lambda _: 0.0)
    obs, _, state, starts = unroll(policy, 1, 50)
    assert FusedPolicy(policy).act(first(obs), state, starts[0]).actions.eq(0).all()


def test_a_preferred_backend_disables_the_programs() -> None:
    policy = policy_of("default", LONE)
    fused = FusedPolicy(policy)
    with prefer("reference"):
        check_act(policy, fused, 3)
        assert fused._lowered is None
    check_act(policy, fused, 3)
    assert fused._lowered is not None
