"""A policy on the CPU in a few calls of C, without the overhead of torch between the operations of small networks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from srwm_rl.native.lowering import LoweredPolicy, UnsupportedModuleError, lower
from srwm_rl.native.ppo_gradient import PPOGradient
from srwm_rl.nn.cores.stack import StackCore
from srwm_rl.nn.cores.unroll import run_in_segments
from srwm_rl.nn.module_fingerprint import ModuleFingerprint
from srwm_rl.nn.policy import ActStep, Obs, SequenceEvaluation, SRWMPolicy
from srwm_rl.ops.backends import preferred
from srwm_rl.ops.program import PPOLossParams

logger = logging.getLogger(__name__)
# The methods that the programs replace; where a subclass or caller has replaced one, the policy runs in torch.
_METHODS = {
    name: getattr(SRWMPolicy, name)
    for name in (
        "act",
        "evaluate_sequence",
        "evaluation",
        "encode",
        "_step",
        "_heads",
        "distribution",
        "sample",
        "action_masks",
    )
}


class FusedPolicy:
    """`act`, `evaluate_sequence` and PPO's gradient of an `SRWMPolicy`, equal up to rounding, in a few calls of C.

    For policies on the CPU with a `StackCore` (the SRWM and its relatives); others run in torch. An SRWM policy with
    `Discrete` actions acts in one call, after torch has run its CNN. The programs read the policy's weights in place,
    so that it may learn between two calls. Their results are compared with the policy's once, after lowering; where
    they differ, a warning is logged and the policy runs in torch.
    """

    def __init__(self, policy: SRWMPolicy) -> None:
        self.policy = policy
        self._lowered: LoweredPolicy | None = None
        self._ppo_gradient: PPOGradient | None = None
        self._lowered_from: ModuleFingerprint | None = None  # also where lowering failed

    def __reduce__(self) -> tuple[type[FusedPolicy], tuple[SRWMPolicy]]:
        """Copy or pickle the policy alone; the copy is lowered anew, because programs hold pointers."""
        return FusedPolicy, (self.policy,)

    @property
    def disabled(self) -> bool:
        """Whether the present policy runs in torch."""
        return self._lowered_from is not None and self._lowered is None

    def act(self, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> ActStep:
        """Sample actions; arguments and result as in `SRWMPolicy.act`, without gradients."""
        with torch.no_grad():
            lowered = self._ready(obs, core_state, episode_starts)
            if lowered is None:
                return self.policy.act(obs, core_state, episode_starts)
            if lowered.step is None:
                action_params, values, core_state = self._run(lowered, obs, core_state, episode_starts[None])
                distribution = self.policy.distribution(action_params, self.policy.action_masks(obs))
                return self.policy.sample(distribution, values, core_state)
            n_actions = int(self.policy.action_space.n)  # type: ignore[attr-defined]
            exp_noise = core_state.new_empty(len(episode_starts), n_actions).exponential_()
            return self._step(lowered, obs, core_state, episode_starts, exp_noise)

    def evaluate_sequence(
        self, obs: Obs, actions: Tensor, core_state: Tensor, episode_starts: Tensor, bptt: int | None = None
    ) -> SequenceEvaluation:
        """Evaluate an unroll; arguments and result as in `SRWMPolicy.evaluate_sequence`."""
        lowered = self._ready(_first(obs), core_state, episode_starts[0])
        if lowered is None or any(tensor.requires_grad for tensor in _tensors(obs)):
            return self.policy.evaluate_sequence(obs, actions, core_state, episode_starts, bptt)
        if lowered.log_prob_and_entropy is None:
            action_params, values, core_state = self._run(lowered, obs, core_state, episode_starts, bptt)
            distribution = self.policy.distribution(action_params, self.policy.action_masks(obs))
            return self.policy.evaluation(distribution, values, actions, core_state)
        action_stats, values, core_state = self._run(lowered, obs, core_state, episode_starts, bptt, actions)
        log_probs, entropy = action_stats.unflatten(0, episode_starts.shape).unbind(-1)
        return SequenceEvaluation(values.view(episode_starts.shape), log_probs, entropy, core_state)

    def add_ppo_gradient(
        self,
        obs: Obs,
        actions: Tensor,
        core_state: Tensor,
        episode_starts: Tensor,
        old: Sequence[Tensor],
        *,
        clip_range: float,
        clip_range_vf: float | None,
        vf_coef: float,
        ent_coef: float,
        scale: float,
        bptt: int | None = None,
    ) -> Tensor | None:
        """Add the gradient of PPO's loss over an unroll to the weights' `.grad`, without autograd.

        The loss is `(policy loss + vf_coef * value loss - ent_coef * entropy) * scale`, each term summed over steps.
        `old` are log-probabilities of the policy that acted, advantages, returns and its values, `[T, B]` each; the
        other arguments are those of `SRWMPolicy.evaluate_sequence` and of SB3's PPO.

        Returns:
            The loss's terms `[5]`, summed over steps: policy loss, value loss, entropy, approximate KL divergence, clip
            fraction. None, and nothing is done, where `evaluate_sequence` and autograd must do it.
        """
        lowered = self._ready(_first(obs), core_state, episode_starts[0])
        if lowered is None or lowered.ppo_loss is None or any(tensor.requires_grad for tensor in _tensors(obs)):
            return None
        assert self._lowered_from is not None
        weights = self._lowered_from.weights
        if any(weight._backward_hooks or weight._post_accumulate_grad_hooks for weight in weights):
            return None  # only autograd calls them
        bptt = None if bptt is None or bptt >= len(episode_starts) else bptt
        if self._ppo_gradient is None or self._ppo_gradient.bptt != bptt:
            self._ppo_gradient = PPOGradient(self.policy, lowered, bptt)
        if self._ppo_gradient.shared:
            return None
        params = PPOLossParams(
            clip_range=clip_range,
            clip_range_vf=-1.0 if clip_range_vf is None else clip_range_vf,
            vf_coef=vf_coef,
            ent_coef=ent_coef,
            scale=scale,
        )
        inputs = [tensor.reshape(-1, 1).float() for tensor in (actions, *old)]
        return self._ppo_gradient.add_gradient(obs, core_state, episode_starts, inputs, params)

    def _ready(self, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> LoweredPolicy | None:
        """Return the present policy's programs; lower it, and compare them on these inputs, where it is new."""
        own = all(getattr(getattr(self.policy, name), "__func__", None) is method for name, method in _METHODS.items())
        if preferred() not in ("auto", "cpu") or not own:
            return None
        if self._lowered_from is None or not self._lowered_from.matches():
            self._lowered_from = ModuleFingerprint(self.policy)
            self._lowered, self._ppo_gradient = self._lower(obs, core_state, episode_starts), None
        return self._lowered

    def _lower(self, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> LoweredPolicy | None:
        if self._lowered_from is not None and self._lowered_from.n_hooks:
            return None  # a program would not call them
        try:
            lowered = lower(self.policy)
        except UnsupportedModuleError:
            return None
        with torch.no_grad():
            difference = self._difference(lowered, obs, core_state, episode_starts)
        if difference:
            logger.warning("the policy runs without its C kernel, whose %s differ from the policy's", difference)
        return None if difference else lowered

    def _difference(self, lowered: LoweredPolicy, obs: Obs, core_state: Tensor, episode_starts: Tensor) -> str:
        """Return which of one step's results differ from the policy's, without random numbers; "" if none."""
        distribution, values, state = self.policy._step(obs, core_state, episode_starts)
        actions = distribution.mode()
        action_params, *values_and_state = self._run(lowered, obs, core_state, episode_starts[None])
        fused_distribution = self.policy.distribution(action_params, self.policy.action_masks(obs))
        results = [(fused_distribution.log_prob(actions), *values_and_state)]
        if lowered.step is not None:  # equal noise for all actions: the most probable one is sampled
            exp_noise = torch.ones_like(action_params)
            step = self._step(lowered, obs, core_state, episode_starts, exp_noise)
            results.append((step.log_probs, step.values, step.core_state))
        if lowered.log_prob_and_entropy is not None:
            action_stats, *values_and_state = self._run(lowered, obs, core_state, episode_starts[None], None, actions)
            results.append((action_stats[:, 0], *values_and_state))
        expected = {"log-probabilities": distribution.log_prob(actions), "values": values, "core states": state}
        for result in results:
            for (name, theirs), ours in zip(expected.items(), result, strict=True):
                if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True):
                    return name
        return ""

    def _step(
        self, lowered: LoweredPolicy, obs: Obs, core_state: Tensor, episode_starts: Tensor, exp_noise: Tensor
    ) -> ActStep:
        assert lowered.step is not None
        batch = len(episode_starts)
        inputs = [*lowered.inputs.of(obs, batch), exp_noise]
        (values, log_probs), actions, core_state = lowered.step.step(inputs, core_state, episode_starts)
        return ActStep(actions, values.view(batch), log_probs.view(batch), core_state)

    def _run(
        self,
        lowered: LoweredPolicy,
        obs: Obs,
        core_state: Tensor,
        episode_starts: Tensor,
        bptt: int | None = None,
        actions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run over an unroll; arguments as of `SRWMPolicy.evaluate_sequence`.

        Returns:
            Log-probabilities and entropy of the actions, or without actions the action head's output, `[T * B, k]`; the
            values `[T * B]`; and the new core state.
        """
        shape, programs = episode_starts.shape, lowered.programs
        if actions is not None:
            assert lowered.log_prob_and_entropy is not None
            programs = [*programs[:-1], lowered.log_prob_and_entropy]
        core: StackCore = self.policy.core  # type: ignore[assignment]
        outputs: Sequence[Tensor] = programs[0].run(lowered.inputs.of(obs, shape.numel()))
        finals = []
        for module, state, program in zip(core.recurrences(), core.split_state(core_state), programs[1:], strict=True):
            *stream, x = outputs
            steps = x.view(*shape, *module.input_shape)
            y, final = run_in_segments(module.recur, steps, state, episode_starts, bptt)
            inputs = [*stream, y.reshape(x.shape)]
            if program is programs[-1] and actions is not None:
                inputs.append(actions.reshape(-1, 1).float())
            outputs = program.run(inputs)
            finals.append(final)
        action_outputs, values = outputs
        return action_outputs, values.view(-1), core.join_state(finals)


def _tensors(obs: Obs) -> list[Tensor]:
    return list(obs.values()) if isinstance(obs, dict) else [obs]


def _first(obs: Obs) -> Obs:
    return {key: tensor[0] for key, tensor in obs.items()} if isinstance(obs, dict) else obs[0]
