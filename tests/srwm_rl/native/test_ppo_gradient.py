"""PPO's gradient in C equals autograd's for every core; unsupported policies are left to autograd."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import Tensor

from srwm_rl.agents.collecting.rollout_buffer import SequenceBatch
from srwm_rl.agents.losses.ppo_loss import PPOLossSums, ppo_loss
from srwm_rl.native.fused_policy import FusedPolicy
from srwm_rl.nn.layers import SRWMLayer
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.ops import cpu
from tests.srwm_rl.native.test_fused_policy import (
    CORES,
    FRAMES,
    LONE,
    MANY,
    SMALL_CNN,
    TWO_CAMERAS,
    first,
    policy_of,
    unroll,
)
from tests.srwm_rl.ops.defaults import other_default, other_defaults

pytestmark = pytest.mark.skipif(isinstance(cpu.load_kernel(), str), reason=str(cpu.load_kernel()))
VF_COEF, ENT_COEF, CLIP_RANGE = 0.6, 0.03, 0.15


def sequence_batch(policy: SRWMPolicy, n_steps: int, batch: int) -> SequenceBatch:
    """Draw a minibatch whose old log probabilities and values differ a little from the policy's."""
    obs, actions, state, starts = unroll(policy, n_steps, batch)
    with torch.no_grad():
        seen = policy.evaluate_sequence(obs, actions, state, starts)
    numbers = torch.randn(4, n_steps, batch, generator=torch.Generator().manual_seed(5))
    return SequenceBatch(
        observations=obs,
        actions=actions,
        episode_starts=starts,
        old_values=seen.values + numbers[0],
        old_log_probs=seen.log_probs + 0.3 * numbers[1],
        advantages=numbers[2],
        returns=numbers[3],
        core_state=state,
    )


def native_gradient(
    fused: FusedPolicy, batch: SequenceBatch, clip_range_vf: float | None = None, bptt: int | None = None
) -> Tensor | None:
    return fused.add_ppo_gradient(
        batch.observations,
        batch.actions,
        batch.core_state,
        batch.episode_starts,
        (batch.old_log_probs, batch.advantages, batch.returns, batch.old_values),
        clip_range=CLIP_RANGE,
        clip_range_vf=clip_range_vf,
        vf_coef=VF_COEF,
        ent_coef=ENT_COEF,
        scale=1 / batch.returns.numel(),
        bptt=bptt,
    )


def autograd(
    policy: SRWMPolicy, old: SequenceBatch, clip_range_vf: float | None = None, bptt: int | None = None
) -> PPOLossSums:
    new = policy.evaluate_sequence(old.observations, old.actions, old.core_state, old.episode_starts, bptt)
    terms = ppo_loss(
        new.values, new.log_probs, new.entropy, old.old_values, old.old_log_probs, old.advantages, old.returns,
        CLIP_RANGE, clip_range_vf,
    )  # fmt: skip
    loss = terms.policy_loss + VF_COEF * terms.value_loss - ENT_COEF * terms.entropy
    (loss / old.returns.numel()).backward()
    return terms


def gradients(policy: SRWMPolicy) -> list[Tensor | None]:
    grads = [None if parameter.grad is None else parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    return grads


def check(policy: SRWMPolicy, n_steps: int, batch: int, **settings: Any) -> None:
    """Compare the gradient and the loss's terms with autograd's."""
    fused, old = FusedPolicy(policy), sequence_batch(policy, n_steps, batch)
    terms = native_gradient(fused, old, **settings)
    assert terms is not None
    ours = gradients(policy)
    expected_terms = autograd(policy, old, **settings)
    torch.testing.assert_close(terms, torch.stack(expected_terms).detach(), rtol=1e-4, atol=1e-3)
    for (name, _), gradient, expected in zip(policy.named_parameters(), ours, gradients(policy), strict=True):
        assert (gradient is None) == (expected is None), name
        if gradient is not None and expected is not None:
            assert (gradient - expected).norm() <= 2e-5 * expected.norm() + 1e-6, name


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("batch", [1, 70])
def test_every_core(core: str, batch: int) -> None:
    policy = policy_of(core)
    check(policy, 9, batch)
    check(policy, 9, batch, bptt=4)
    check(policy, 33, 3, clip_range_vf=0.5)


@pytest.mark.parametrize("space", [LONE, MANY], ids=["lone", "many"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"net_arch": {"pi": [8, 7], "vf": [9]}},
        {"encoder_kwargs": {"mlp": ()}},
        {"encoder_kwargs": {"mlp": (12, 10)}},
    ],
    ids=["plain", "two towers", "no mlp", "deep mlp"],
)
def test_every_space(space: spaces.Space[Any], settings: dict[str, Any]) -> None:
    check(policy_of("two layers", space, **settings), 6, 5)


@pytest.mark.parametrize("space", [FRAMES, TWO_CAMERAS], ids=["frames", "two cameras"])
def test_images(space: spaces.Space[Any]) -> None:
    policy = policy_of("two layers", space, encoder_kwargs=SMALL_CNN)
    check(policy, 6, 5)
    check(policy, 6, 15, bptt=4)
    frozen = next(iter(policy.features_extractor.images.values()))
    frozen.requires_grad_(False)
    check(policy, 6, 5)
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_groups_of_images_add_up() -> None:
    policy = policy_of("two layers", FRAMES, encoder_kwargs=SMALL_CNN)
    fused, old = FusedPolicy(policy), sequence_batch(policy, 6, 15)
    native_gradient(fused, old)
    once = gradients(policy)
    for _ in range(2):
        native_gradient(fused, old)
    for single, summed in zip(once, gradients(policy), strict=True):
        torch.testing.assert_close(2 * single, summed)


def test_several_groups_add_up() -> None:
    policy = policy_of("two layers")
    fused, old = FusedPolicy(policy), sequence_batch(policy, 7, 4)
    native_gradient(fused, old)
    once = gradients(policy)
    native_gradient(fused, old)
    kept = [parameter.grad for parameter in policy.parameters()]
    native_gradient(fused, old)
    for single, summed in zip(once, gradients(policy), strict=True):
        torch.testing.assert_close(2 * single, summed)
    # A kept reference to the first group's gradient is not overwritten by the next update.
    native_gradient(fused, old._replace(advantages=2 * old.advantages))
    for single, summed in zip(once, kept, strict=True):
        assert torch.equal(single, summed)


def test_frozen_weights_get_no_gradient() -> None:
    policy = policy_of("two layers")
    frozen = [
        policy.value_net.weight,
        next(module for module in policy.core.modules() if isinstance(module, SRWMLayer)).weight,
    ]
    for weight in frozen:
        weight.requires_grad_(False)
    check(policy, 6, 5)
    assert all(weight.grad is None for weight in frozen)


def test_the_gradient_does_not_depend_on_threads() -> None:
    policy = policy_of("two layers")
    old = sequence_batch(policy, 70, 40)  # 2,800 rows: several shares
    results = []
    try:
        for n in (1, 3):
            cpu.set_threads(n)
            native_gradient(FusedPolicy(policy), old)
            results.append(gradients(policy))
    finally:
        cpu.set_threads(None)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def tied_linear(core: Any) -> None:
    core.layers[1].out.weight = core.layers[0].out.weight


def tied_memory(core: Any) -> None:
    core.layers[1].weight = core.layers[0].weight


def one_block_twice(core: Any) -> None:
    core.blocks[1] = core.blocks[0]


def one_layer_twice(core: Any) -> None:
    core.layers[1] = core.layers[0]


@pytest.mark.parametrize("tie", [tied_linear, tied_memory, one_block_twice, one_layer_twice])
def test_shared_weights_are_left_to_autograd(tie: Any) -> None:
    policy = policy_of("two layers")
    tie(policy.core)
    fused, old = FusedPolicy(policy), sequence_batch(policy, 5, 3)
    assert native_gradient(fused, old) is None
    assert not fused.disabled


def test_a_recurrence_replaced_in_python_keeps_its_backward() -> None:
    policy = policy_of()
    layer = policy.core.layers[0]
    own = layer.recur
    layer.recur = lambda heads, *more: own((heads + heads.detach()) / 2, *more)
    check(policy, 6, 5)


def test_a_critic_that_does_not_shape_the_memory_is_left_to_autograd() -> None:
    class Detached(MlpExtractor):
        def forward_critic(self, features: Tensor) -> Tensor:
            return super().forward_critic(features.detach())

        def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
            return self.forward_actor(features), self.forward_critic(features)

    policy = policy_of("default", LONE, net_arch=[8])
    policy.mlp_extractor.__class__ = Detached
    assert native_gradient(FusedPolicy(policy), sequence_batch(policy, 3, 2)) is None


@pytest.mark.parametrize("wrong", [lambda state: state.double(), lambda state: state[:, :1]])
def test_a_state_that_does_not_fit_is_not_read(wrong: Any) -> None:
    policy = policy_of()
    fused, old = FusedPolicy(policy), sequence_batch(policy, 3, 2)
    assert native_gradient(fused, old) is not None
    with pytest.raises(ValueError, match=r"core_state must be torch.float32 \[1, 2, [0-9]+\] on the CPU, not torch"):
        native_gradient(fused, old._replace(core_state=wrong(old.core_state)))


@pytest.mark.parametrize("action", ["box", "multi", "bits"])
def test_other_heads_are_left_to_autograd(action: str) -> None:
    policy = policy_of("default", LONE, action)
    old = sequence_batch(policy, 3, 2)
    assert native_gradient(FusedPolicy(policy), old) is None
    assert gradients(policy) == [None] * len(list(policy.parameters()))


@pytest.mark.parametrize("method", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_weights_are_called_by_autograd(method: str) -> None:
    policy = policy_of()
    fused, old = FusedPolicy(policy), sequence_batch(policy, 3, 2)
    assert native_gradient(fused, old) is not None
    handle = getattr(policy.value_net.weight, method)(lambda _: None)
    assert native_gradient(fused, old) is None
    handle.remove()
    assert native_gradient(fused, old) is not None


def test_observations_that_want_a_gradient_get_it_from_autograd() -> None:
    policy = policy_of("default", LONE)
    old = sequence_batch(policy, 3, 2)
    assert isinstance(old.observations, Tensor)
    assert native_gradient(FusedPolicy(policy), old._replace(observations=old.observations.requires_grad_())) is None


def test_nan_observations_reach_the_loss_terms_and_the_gradient() -> None:
    policy = policy_of("default", LONE)
    old = sequence_batch(policy, 3, 2)
    assert isinstance(old.observations, Tensor)
    old.observations[1, 1, 2] = np.nan
    fused = FusedPolicy(policy)
    terms = native_gradient(fused, old)
    assert terms is not None
    assert not terms[:3].isfinite().any()
    assert any(not gradient.isfinite().all() for gradient in gradients(policy) if gradient is not None)


@other_defaults
@pytest.mark.parametrize("space", [LONE, FRAMES], ids=["lone", "frames"])
def test_defaults_of_torch_do_not_matter(space: spaces.Space[Any], kind: str) -> None:
    policy = policy_of("conv", space, encoder_kwargs={} if space is LONE else SMALL_CNN)
    old = sequence_batch(policy, 6, 5)
    obs, state, starts = old.observations, old.core_state, old.episode_starts[0]

    def results() -> list[Tensor]:
        fused = FusedPolicy(policy)
        torch.manual_seed(0)
        terms = native_gradient(fused, old)
        assert terms is not None
        step = fused.act(first(obs), state, starts)
        assert not fused.disabled
        return [terms, *step, *(gradient for gradient in gradients(policy) if gradient is not None)]

    expected = results()
    with other_default(kind):
        assert all(map(torch.equal, results(), expected))
