"""`SRWMPolicy`: encoder -> core -> heads, as a Stable-Baselines3 policy class."""

from __future__ import annotations

import inspect
import math
from copy import copy
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from srwm_rl.errors import UserError, check_settings
from srwm_rl.nn.cores import Core, make_core
from srwm_rl.nn.cores.unroll import run_core
from srwm_rl.nn.distributions import make_distribution
from srwm_rl.nn.encoders import MAIN_KEY, Encoder, flatten_obs_space, is_image
from srwm_rl.nn.extractors import ExtractorInputs, make_extractor
from srwm_rl.nn.optimizer_hooks import scale_edit_columns
from srwm_rl.nn.policy_settings import (
    ACTIVATIONS,
    activation_class,
    checked_net_arch,
    encoder_settings,
    refuse_unsupported,
)
from srwm_rl.nn.predict_inputs import batched_masks, batched_observation, batched_starts, check_state, mask_of
from srwm_rl.nn.spaces import ACTION_MASK, as_floats, check_action_space, env_actions, has_action_mask, without_mask

Obs = Tensor | dict[str, Tensor]
MASKED = -1e8  # logit of an action that is not allowed: finite, so that its probability of 0 has an entropy


class ActStep(NamedTuple):
    """One acting step for B environments."""

    actions: Tensor  # [B, *action_shape]
    values: Tensor  # [B]
    log_probs: Tensor  # [B]
    core_state: Tensor  # [L, B, S]


class SequenceEvaluation(NamedTuple):
    """An unroll evaluated under the current weights."""

    values: Tensor  # [T, B]
    log_probs: Tensor  # [T, B]
    entropy: Tensor  # [T, B]
    core_state: Tensor  # [L, B, S]


class SRWMPolicy(RecurrentActorCriticPolicy):
    """Actor-critic policy with any `srwm_rl` core as its memory; actor and critic share encoder and core.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict of them; images stay uint8, in
            either layout.
        action_space: Discrete, MultiDiscrete, MultiBinary or Box.
        lr_schedule: learning rate as a function of the remaining progress (SB3).
        core: a core's name, see `srwm_rl.core_names()`.
        core_kwargs: its settings.
        net_arch: extra layers between core and heads, SB3's spelling; none by default.
        activation_fn: of those layers: "tanh", "relu", "elu", "gelu" or a class.
        encoder_kwargs: settings of `srwm_rl.nn.encoders.Encoder`.
        features_extractor_class: an encoder of your own, a subclass of SB3's `BaseFeaturesExtractor`; as in SB3 it gets
            images channels-first and multiplied by 1/255 unless `normalize_images` is False, discrete values as
            one-hots.
        features_extractor_kwargs: its settings, or those of `Encoder` (SB3's `features_dim` and `cnn_output_dim` mean
            the width of a CNN's output).

    The others are SB3's. An entry "action_mask" of a Dict observation, one bit per Discrete action (per choice of a
    MultiDiscrete one), is no input of the network: actions whose bit is 0 have the probability 0.

    Raises:
        UserError: an unknown core or setting, or an unsupported space.
    """

    core: Core
    features_extractor: Encoder  # or an instance of `features_extractor_class`

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        core: str = "srwm",
        core_kwargs: dict[str, Any] | None = None,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: str | type[nn.Module] = "tanh",
        ortho_init: bool = True,
        log_std_init: float = 0.0,
        encoder_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        **unsupported: Any,
    ) -> None:
        refuse_unsupported(unsupported, inspect.signature(SRWMPolicy).parameters.keys() - {"unsupported"})
        check_action_space(action_space)
        self.core_name, self.core_kwargs = core, core_kwargs or {}
        if "input_size" in (core_kwargs or {}):
            raise UserError("input_size is no setting of the core: the encoder's width decides it; leave it out")
        self.masked = has_action_mask(observation_space, action_space)
        self._input_space = without_mask(observation_space) if self.masked else observation_space
        self.obs_spaces = flatten_obs_space(self._input_space)
        own = features_extractor_class not in (None, Encoder)
        images = any(is_image(space, normalize_images=False) for space in self.obs_spaces.values())
        extractor = {} if own else encoder_settings(features_extractor_kwargs or {}, images)
        settings = {**(encoder_kwargs or {}), **extractor}
        check_settings("the encoder", settings, inspect.signature(Encoder).parameters.keys() - {"observation_space"})
        normalize_images = settings.pop("normalize_images", normalize_images)
        self.encoder_kwargs = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
        if own and settings:
            raise UserError("encoder_kwargs are of our own encoder: give yours features_extractor_kwargs")
        if optimizer_kwargs is None and optimizer_class is torch.optim.Adam:
            optimizer_kwargs = {"eps": 1e-5, "fused": True}  # SB3's eps
        # Not super().__init__, which would build LSTMs.
        ActorCriticPolicy.__init__(
            self,
            observation_space,
            action_space,
            lr_schedule,
            net_arch=checked_net_arch(net_arch),
            activation_fn=activation_class(activation_fn),
            ortho_init=ortho_init,
            log_std_init=log_std_init,
            features_extractor_class=features_extractor_class or Encoder,
            features_extractor_kwargs=(features_extractor_kwargs or {}) if own else self.encoder_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """Build the encoder: ours, or the class that was given."""
        if self.features_extractor_class is Encoder:
            self._extractor_inputs = None
            settings: dict[str, Any] = {**self.encoder_kwargs, "normalize_images": self.normalize_images}
            return Encoder(self._input_space, **settings)
        self._extractor_inputs = ExtractorInputs(self._input_space, self.normalize_images)
        return make_extractor(
            self.features_extractor_class, self._extractor_inputs.space, self.features_extractor_kwargs
        )

    @property
    def has_images(self) -> bool:
        """Whether a CNN reads part of the observation; then memory limits how many frames are encoded at once."""
        if self._extractor_inputs is None:
            return len(self.features_extractor.images) > 0
        return any(isinstance(module, nn.Conv2d) for module in self.features_extractor.modules())

    def _build_mlp_extractor(self) -> None:
        # SB3 calls this after it builds the encoder and before heads and optimizer.
        self.action_dist = make_distribution(self.action_space)
        self.core = make_core(self.core_name, self.features_dim, **self.core_kwargs)
        self.mlp_extractor = MlpExtractor(
            self.core.output_size, net_arch=self.net_arch, activation_fn=self.activation_fn, device=self.device
        )

    def _build(self, lr_schedule: Schedule) -> None:
        # SB3 would apply orthogonal initialisation to the CNN too: with its gain of sqrt(2) a ResNet's activations grow
        # with every block, and it cannot write into channels-last weights.
        ortho, self.ortho_init = self.ortho_init, False
        super()._build(lr_schedule)
        scale_edit_columns(self.optimizer, self.core)
        self.ortho_init = ortho
        if ortho:
            encoder: Any = self.features_extractor
            gains = {
                encoder.mlp if isinstance(encoder, Encoder) else encoder: 2**0.5,
                self.mlp_extractor: 2**0.5,
                self.action_net: 0.01,
                self.value_net: 1.0,
            }
            for module, gain in gains.items():
                module.apply(partial(self.init_weights, gain=gain))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if getattr(self, "optimizer", None) is not None:
            scale_edit_columns(self.optimizer, self.core)  # copies of an optimizer have no hooks

    def settings(self) -> dict[str, Any]:
        """Return the architecture's keyword arguments as JSON types.

        Raises:
            UserError: it has an encoder or activation of one's own, which a model file cannot hold.
        """
        activation = next((name for name, module in ACTIVATIONS.items() if module is self.activation_fn), None)
        if self._extractor_inputs is not None or activation is None:
            raise UserError(
                "a model file cannot hold classes of your own (features_extractor_class, activation_fn); save the "
                "model as a zip, with model.save"
            )
        return {
            "core": self.core_name,
            "core_kwargs": self.core_kwargs,
            "encoder_kwargs": self.encoder_kwargs,
            "net_arch": self.net_arch,
            "activation_fn": activation,
            "normalize_images": self.normalize_images,
        }

    @property
    def lstm_actor(self) -> SimpleNamespace:  # type: ignore[override]
        """The state's sizes, by which sb3-contrib allocates its `[L, B, S]` buffers."""
        return SimpleNamespace(num_layers=self.core.state_layers, hidden_size=self.core.state_size)

    @property
    def lstm_hidden_state_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """Shape of one environment's state, `(L, 1, S)`, under sb3-contrib's name."""
        return (self.core.state_layers, 1, self.core.state_size)

    def initial_state(self, batch: int) -> Tensor:
        """Return the core state of `batch` new episodes, `[L, B, S]`."""
        return self.core.initial_state(batch)

    def act(
        self,
        obs: Obs,
        core_state: Tensor,
        episode_starts: Tensor,
        deterministic: bool = False,
        action_masks: Tensor | None = None,
    ) -> ActStep:
        """Sample actions for `[B, ...]` observations; `core_state` `[L, B, S]`, `episode_starts` `[B]`.

        `action_masks` `[B, k]` replace those in the observation.
        """
        return self.sample(*self._step(obs, core_state, episode_starts, action_masks), deterministic)

    def sample(
        self, distribution: Distribution, values: Tensor, core_state: Tensor, deterministic: bool = False
    ) -> ActStep:
        """Sample actions from the distribution of an acting step."""
        actions = distribution.get_actions(deterministic=deterministic)
        log_probs = distribution.log_prob(actions)
        return ActStep(actions.reshape(-1, *(self.action_space.shape or ())), values, log_probs, core_state)

    def evaluate_sequence(
        self, obs: Obs, actions: Tensor, core_state: Tensor, episode_starts: Tensor, bptt: int | None = None
    ) -> SequenceEvaluation:
        """Evaluate the actions `[T, B, *action_shape]` of an unroll, with gradients through time.

        `obs` is `[T, B, ...]` or a dict of such, `core_state` `[L, B, S]` before the first step, `episode_starts`
        `[T, B]`; the gradient through the core's state is cut every `bptt` steps (None: never).
        """
        n_steps, batch = episode_starts.shape
        features = self.encode(obs, n_steps * batch).view(n_steps, batch, -1)  # [T, B, I]
        y, core_state = run_core(self.core, features, core_state, episode_starts, bptt)
        distribution, values = self._heads(y.flatten(0, 1), self.action_masks(obs))
        return self.evaluation(distribution, values, actions, core_state)

    def evaluation(
        self, distribution: Distribution, values: Tensor, actions: Tensor, core_state: Tensor
    ) -> SequenceEvaluation:
        """Evaluate `actions` `[T, B, *action_shape]` under a distribution of `T * B` steps; `values` `[T * B]`."""
        if isinstance(self.action_space, spaces.MultiBinary):
            actions = actions.float()  # as Bernoulli's cross entropy requires
        n, columns = actions.shape[:2].numel(), math.prod(self.action_space.shape or ())
        single = isinstance(self.action_space, spaces.Discrete)
        log_probs = distribution.log_prob(actions.reshape(n) if single else actions.reshape(n, columns))
        entropy = distribution.entropy()
        entropy = -log_probs if entropy is None else entropy
        shape = actions.shape[:2]
        return SequenceEvaluation(values.view(shape), log_probs.view(shape), entropy.view(shape), core_state)

    def encode(self, obs: Obs, n: int, frame_index: Tensor | None = None) -> Tensor:
        """Map observations, `n` over all leading axes, to features `[n, I]`; `frame_index` as of `Encoder.forward`."""
        arrays = obs if isinstance(obs, dict) else {MAIN_KEY: obs}
        if self._extractor_inputs is not None:
            features: Tensor = self.features_extractor(self._extractor_inputs(arrays, n))
            return features
        inputs = {}
        images = self.features_extractor.images
        for key, space in self.obs_spaces.items():
            array = arrays[key].reshape(n if frame_index is None else -1, *(space.shape or ()))
            inputs[key] = array if key in images else as_floats(array, space)  # the CNN scales images
        features = self.features_extractor(inputs, frame_index)
        return features

    def action_masks(self, obs: Obs) -> Tensor | None:
        """Return the action masks in observations, `[n, k]` over all their leading axes; None: there are none."""
        if not self.masked or not isinstance(obs, dict):
            return None
        mask = obs[ACTION_MASK]
        return mask.reshape(-1, mask.shape[-1]) != 0

    def _step(
        self, obs: Obs, core_state: Tensor, episode_starts: Tensor, action_masks: Tensor | None = None
    ) -> tuple[Distribution, Tensor, Tensor]:
        features = self.encode(obs, len(episode_starts))
        y, core_state = self.core(features[None], core_state, episode_starts[None])
        masks = self.action_masks(obs) if action_masks is None else action_masks
        return (*self._heads(y[0], masks), core_state)

    def _heads(self, y: Tensor, action_masks: Tensor | None = None) -> tuple[Distribution, Tensor]:
        latent_pi, latent_vf = self.mlp_extractor(y)
        return self.distribution(self.action_net(latent_pi), action_masks), self.value_net(latent_vf).squeeze(-1)

    def distribution(self, action_params: Tensor, action_masks: Tensor | None = None) -> Distribution:
        """Return the action distributions for the action head's output `[n, k]`: logits, or a Gaussian's mean.

        Where `action_masks` `[n, k]` is False, an action has the probability 0.
        """
        if action_masks is not None:
            action_params = action_params.masked_fill(~action_masks, MASKED)
        dist = copy(self.action_dist)  # stores its parameters: threads must not share it
        if isinstance(dist, DiagGaussianDistribution):
            return dist.proba_distribution(action_params, self.log_std)
        return dist.proba_distribution(action_params)

    # The interface of sb3-contrib and SB3, in their layouts.

    def forward(  # type: ignore[override]
        self,
        obs: Obs,
        lstm_states: RNNStates | None = None,
        episode_starts: Tensor | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, RNNStates]:
        """Act for `RecurrentPPO`; all four of its state arrays hold the core state.

        Raises:
            UserError: no state, as from the algorithms of SB3 itself.
        """
        if lstm_states is None or episode_starts is None:
            raise UserError(
                "this trainer keeps no memory: train an SRWMPolicy with srwm_rl.agents.PPO or IMPALA, or with "
                "sb3_contrib.RecurrentPPO"
            )
        step = self.act(obs, lstm_states.pi[0], episode_starts, deterministic)
        pair = (step.core_state, step.core_state)
        return step.actions, step.values[:, None], step.log_probs, RNNStates(pair, pair)

    def get_distribution(  # type: ignore[override]
        self, obs: Obs, lstm_states: tuple[Tensor, ...], episode_starts: Tensor
    ) -> tuple[Distribution, tuple[Tensor, ...]]:
        """Return the action distribution for `[B, ...]` observations and the new state."""
        distribution, _, core_state = self._step(obs, lstm_states[0], episode_starts)
        return distribution, (core_state, core_state)

    def predict_values(  # type: ignore[override]
        self, obs: Obs, lstm_states: tuple[Tensor, ...], episode_starts: Tensor
    ) -> Tensor:
        """Return the values `[B, 1]` of `[B, ...]` observations."""
        return self._step(obs, lstm_states[0], episode_starts)[1][:, None]

    def evaluate_actions(  # type: ignore[override]
        self, obs: Obs, actions: Tensor, lstm_states: RNNStates, episode_starts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate a padded minibatch of `RecurrentPPO`, batch-major `[B * T, ...]` with B from the state."""
        batch = lstm_states.pi[0].shape[1]
        starts = _time_major(episode_starts, batch)
        obs = {k: _time_major(v, batch) for k, v in obs.items()} if isinstance(obs, dict) else _time_major(obs, batch)
        result = self.evaluate_sequence(obs, _time_major(actions, batch), lstm_states.pi[0], starts)
        values, log_probs, entropy = (tensor.transpose(0, 1).flatten() for tensor in result[:3])
        return values[:, None], log_probs, entropy

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | bool | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Choose actions for `[B, ...]` or one environment's `[...]` observations, as SB3's `predict`.

        `episode_start` is `[B]` or one flag for all; `action_masks` `[B, k]` (or `[k]`) as of sb3-contrib's
        `MaskablePPO`, in place of those in the observation. Returns the actions `[B, *action_shape]` (without B for a
        single observation) and the state, a tuple of one array `[L, B, S]`, for the next call; None: new episodes.

        Raises:
            UserError: an observation, state or mask that does not fit this policy or is not finite; or such output.
        """
        self.set_training_mode(False)
        arrays, batch, vectorized = batched_observation(observation, self.obs_spaces, MAIN_KEY)
        obs: dict[str, Tensor] = {key: torch.as_tensor(array, device=self.device) for key, array in arrays.items()}
        core_state = self._state_tensor(state, batch)
        if action_masks is None and self.masked:
            action_masks = mask_of(observation)
        allowed = None
        if action_masks is not None:
            allowed = torch.as_tensor(batched_masks(action_masks, self.action_space, batch), device=self.device)
        starts = torch.as_tensor(batched_starts(episode_start, batch), device=self.device)
        with torch.no_grad():
            step = self.act(obs, core_state, starts, deterministic, allowed)
        if not torch.isfinite(step.log_probs).all():
            raise UserError(
                "the policy's output is not finite: its weights are, or its state is; use another checkpoint"
            )
        actions = env_actions(step.actions.cpu().numpy(), self.action_space)
        return actions if vectorized else actions.squeeze(axis=0), (step.core_state.cpu().numpy(),)

    def _state_tensor(self, state: tuple[np.ndarray, ...] | None, batch: int) -> Tensor:
        if state is None:
            return self.initial_state(batch)
        if not isinstance(state, tuple | list) or len(state) != 1:
            raise UserError("state is None at the start, then the tuple that predict returned")
        check_state(state[0], (self.core.state_layers, batch, self.core.state_size), self.core_name)
        return torch.as_tensor(state[0], dtype=torch.float32, device=self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        inherited = {"squash_output", "full_std", "use_expln", "use_sde"}
        if self._extractor_inputs is None:
            inherited |= {"features_extractor_class", "features_extractor_kwargs"}
        data = {name: value for name, value in data.items() if name not in inherited}
        return data | {"core": self.core_name, "core_kwargs": self.core_kwargs, "encoder_kwargs": self.encoder_kwargs}


def _time_major(batch_major: Tensor, batch: int) -> Tensor:
    return batch_major.view(batch, -1, *batch_major.shape[1:]).transpose(0, 1)
