"""What a trainer makes of the environments that it is given, and what it refuses at construction."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import gymnasium
from gymnasium import spaces
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize
from stable_baselines3.common.vec_env.patch_gym import _patch_env

from srwm_rl.agents.action_masks import VecActionMasks
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.nn.encoders import MAIN_KEY, Encoder, flatten_obs_space, is_episode_step, is_image
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.nn.spaces import ACTION_MASK, check_action_space, has_action_mask, without_mask

logger = logging.getLogger(__name__)
SYMBOLS = 32  # numbers below are no pixels: a picture of 0 to 31 of 255 is all but black


def without_pictures(env: Any) -> Any:
    """Return an environment of a ProcGen id, others as they are: SB3 would have large pictures drawn in every step."""
    is_procgen = isinstance(env, str) and env.removeprefix("srwm_rl:").startswith("procgen-")
    return gymnasium.make(env) if is_procgen else env


def wrap_env(env: Any, monitor_wrapper: bool) -> VecEnv:
    """Return environments as a `VecEnv` whose observations the policy can read.

    SB3's own version would also copy every image to channels-first; the encoder reads both layouts.

    Raises:
        UserError: the policy cannot read or act in them.
    """
    if isinstance(env, str):
        env = gymnasium.make(env)
    if isinstance(env, gymnasium.vector.VectorEnv):
        raise UserError(
            "a Gymnasium vector environment is no VecEnv of SB3: give the trainer a single environment, "
            "stable_baselines3.common.env_util.make_vec_env(env_id, n_envs), or one of srwm_rl.envs"
        )
    if not isinstance(env, VecEnv):
        env = _gymnasium_env(env)
    flatten_obs_space(env.observation_space)  # both raise for spaces the policy cannot read or act in
    check_action_space(env.action_space)
    monitor = monitor_wrapper and not isinstance(env, VecEnv) and not is_wrapped(env, Monitor)
    venv = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: Monitor(env) if monitor else env])
    _check_normalization(venv)
    if not has_action_mask(venv.observation_space, venv.action_space) and venv.has_attr("action_masks"):
        venv = VecActionMasks(venv)
    return venv


def _gymnasium_env(env: Any) -> gymnasium.Env[Any, Any]:
    """Return an environment, one of OpenAI's gym by way of shimmy, as in SB3."""
    try:
        return _patch_env(env)
    except ValueError as error:
        hint = f": give an instance, {env.__name__}()" if isinstance(env, type) else ""
        raise UserError(f"an environment is an id, a gymnasium.Env or a VecEnv of SB3, not {env!r}{hint}") from error


def _check_normalization(venv: VecEnv) -> None:
    """Raise a `UserError` if SB3's `VecNormalize` normalises the step within the episode."""
    layer: Any = venv
    while isinstance(layer, VecEnvWrapper):
        if isinstance(layer, VecNormalize) and layer.norm_obs and isinstance(layer.observation_space, spaces.Dict):
            for key in layer.norm_obs_keys or ():
                if is_episode_step(key, layer.observation_space.spaces[key]):
                    raise UserError(
                        f"VecNormalize would normalise {key}, which the policy counts in: wrap in the other order, "
                        "VecMemoryInputs(VecNormalize(venv)), or give VecNormalize norm_obs_keys"
                    )
        layer = layer.venv


def check_policy_name(name: str, observation_space: spaces.Space[Any], action_space: Any, policy_kwargs: Any) -> None:
    """Raise a `UserError` where a policy was named, in SB3's words, that does not read these observations."""
    space = observation_space
    if has_action_mask(space, action_space):
        if name == "MultiInputPolicy":  # the observations are a Dict, of the mask and at least one more entry
            return
        rest: Any = without_mask(space)
        space = rest.spaces[MAIN_KEY] if rest.spaces.keys() == {MAIN_KEY} else rest
    if isinstance(space, spaces.Dict) != (name == "MultiInputPolicy"):
        other = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy or CnnPolicy"
        raise UserError(f"you must use {other} (or SRWMPolicy) for {type(space).__name__} observations, not {name}")
    normalized = (policy_kwargs or {}).get("normalize_images", True)
    if name == "CnnPolicy" and not is_image(space, normalized):
        raise UserError(
            f"CnnPolicy needs images, Box(0, 255, (h, w, C), uint8), or floats of that shape with "
            f"policy_kwargs={{'normalize_images': False}}, not {space}: name MlpPolicy or SRWMPolicy for others"
        )
    if name == "MlpPolicy" and is_image(space, normalized):
        raise UserError(f"MlpPolicy has no CNN for images of shape {space.shape}: name CnnPolicy or SRWMPolicy")


_LSTM_NAMES = ("MlpLstmPolicy", "CnnLstmPolicy", "MultiInputLstmPolicy")
# SB3's and sb3-contrib's methods of a policy, and what these trainers call instead.
_CALLED_INSTEAD = {
    "forward": "act",
    "get_distribution": "act",
    "predict_values": "act",
    "evaluate_actions": "evaluate_sequence",
}


def check_policy(policy: Any, names: Iterable[str]) -> None:
    """Raise a `UserError` for a policy that is none of `names`, or a class that these trainers run otherwise, or not.

    Args:
        policy: a class or a name.
        names: that stand for `SRWMPolicy`.
    """
    if isinstance(policy, str):
        if policy in names:
            return
        if policy in _LSTM_NAMES:
            raise UserError(
                f"{policy} is sb3-contrib's: name {policy.replace('Lstm', '')}, with policy_kwargs={{'core': 'lstm'}} "
                "for the same kind of memory"
            )
        raise UserError(f"there is no policy {policy!r}{did_you_mean(policy, names)}")
    if not isinstance(policy, type) or not issubclass(policy, SRWMPolicy):
        name = getattr(policy, "__name__", repr(policy))
        raise UserError(f"{name} is no subclass of srwm_rl.SRWMPolicy, whose core these trainers need")
    for method, instead in _CALLED_INSTEAD.items():
        if _is_own(policy, method) and not _is_own(policy, instead):
            raise UserError(
                f"{policy.__name__} overrides {method}, which this trainer does not call: override {instead}, or train "
                "with sb3_contrib.RecurrentPPO"
            )


def _is_own(policy: type[SRWMPolicy], method: str) -> bool:
    return getattr(policy, method) is not getattr(SRWMPolicy, method)


def warn_of_symbols(observations: Any, policy: SRWMPolicy) -> None:
    """Warn, after a reset, of images of small numbers: symbols, which would hardly differ once they are scaled.

    Args:
        observations: of all environments, `[n, h, w, C]`, or a dict of such.
        policy: that reads them.
    """
    parts = observations if isinstance(observations, dict) else {MAIN_KEY: observations}
    encoder = policy.features_extractor
    for key, cnn in encoder.images.items() if isinstance(encoder, Encoder) else ():
        highest = parts[key].max()
        if cnn.scale == 1 / 255 and 0 < highest < SYMBOLS:
            scale = f"--encoder-kwargs 'cnn:{{\"scale\":{1 / highest:.1g}}}'"
            one_hots = "" if highest == 1 else "--wrapper srwm_rl.envs:OneHotImage, or at least "
            logger.warning(
                f"observation {key} holds no number above {highest}, and the CNN divides by 255: if these are symbols, "
                f"not pixels, add {one_hots}{scale} (docs/how-to/environments.md)"
            )


def warn_of_unused_masks(venv: VecEnv) -> None:
    """Warn, after a reset, of masks in the infos that the policy does not get."""
    masked = has_action_mask(venv.observation_space, venv.action_space)
    infos = getattr(venv.unwrapped, "reset_infos", ())  # a VecEnv of one's own may lack them
    if not masked and any(ACTION_MASK in info for info in infos):
        logger.warning("info['action_mask'] is not used: wrap the environments in srwm_rl.agents.VecActionMasks")
