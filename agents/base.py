"""What PPO and IMPALA share: the interface to SB3, acting with a core state, truncated episodes, logging."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain, takewhile
from math import ceil, isfinite
from numbers import Real
from operator import itemgetter
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from srwm_rl.agents.check_obs import check_obs
from srwm_rl.agents.distributed import SINGLE, ProcessGroup
from srwm_rl.agents.engine.engine import Engine
from srwm_rl.agents.engine.nan_guard import ON_NAN, NanGuard, OnNan
from srwm_rl.agents.engine.transfer import map_obs, to_device
from srwm_rl.agents.environments import (
    check_policy,
    check_policy_name,
    warn_of_symbols,
    warn_of_unused_masks,
    without_pictures,
    wrap_env,
)
from srwm_rl.agents.frames_at_once import default_frames_at_once
from srwm_rl.errors import UserError, check_settings
from srwm_rl.nn.policy import ActStep, Obs, SRWMPolicy
from srwm_rl.ops.checks import is_autocast
from srwm_rl.storage.model_schema import weights_of

SelfRecurrent = TypeVar("SelfRecurrent", bound="RecurrentAlgorithm")
NOT_SAVED = ("_core_state", "engine", "nan_guard", "processes", "rollout_buffer_class", "_ended_episodes", "_progress")
ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
# Settings of SB3's algorithms that these have not, with the only values they may have.
UNSUPPORTED = {
    "use_sde": (False, "there is no state-dependent exploration"),
    "sde_sample_freq": (-1, "there is no state-dependent exploration"),
    "rollout_buffer_class": (None, "the rollout buffer keeps whole sequences"),
    "rollout_buffer_kwargs": (None, "the rollout buffer keeps whole sequences"),
}

ARGUMENTS_OF_POLICIES = {"observation_space", "action_space", "lr_schedule", "use_sde"}
SB3_NAMES = ("MlpPolicy", "CnnPolicy", "MultiInputPolicy")


class RecurrentAlgorithm(OnPolicyAlgorithm):
    """An SB3 on-policy algorithm whose policy is an `SRWMPolicy`; a subclass collects and learns.

    Attributes:
        engine: runs the policy and makes the gradient of `loss`.
        nan_guard: checks for numbers that are not finite.
        processes: those that train this policy together, each with its own environments; see `join`.
        weights_lock: held while weights change, and while a callback may read them.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = dict.fromkeys(("SRWMPolicy", *SB3_NAMES), SRWMPolicy)
    policy: SRWMPolicy
    engine: Engine
    nan_guard: NanGuard
    buffer_class: ClassVar[type[Any]]
    fixed_by_zip: ClassVar[tuple[str, ...]] = ()  # settings of the optimizer, whose state a zip holds
    frames_at_once: int | None
    on_nan: OnNan
    bptt: int | None
    processes: ProcessGroup = SINGLE
    weights_lock: AbstractContextManager[Any] = nullcontext()
    _actor: SRWMPolicy | None = None  # a copy of the policy that acts while the policy learns
    _core_state: Tensor | None = None  # [L, B, S], with which the next step begins
    # Number of steps, info and whether it is done; of this rollout and process, while there are other processes.
    _ended_episodes: list[tuple[int, dict[str, Any], bool]]
    _progress: float | Tensor  # fraction of the run left at the last update, 1 to 0: the same in all processes

    def __init__(self, arguments: dict[str, Any], **others: Any) -> None:
        """Initialise SB3's class; the subclass keeps its own settings and calls `_setup_model`.

        Args:
            arguments: of the subclass's constructor by name, of which SB3 gets those that it takes.
            others: arguments for SB3.
        """
        _refuse(type(self), arguments["unsupported"])
        names = inspect.signature(OnPolicyAlgorithm).parameters.keys() - {"_init_setup_model", *UNSUPPORTED}
        settings = {name: value for name, value in arguments.items() if name in names}
        name = arguments["policy"]
        check_policy(name, self.policy_aliases)
        if isinstance(name, str):
            settings["policy"] = self.policy_aliases.get(name, name)
        if arguments["env"] is None and arguments["_init_setup_model"]:
            raise UserError("env=None: give an id, a gymnasium.Env or a VecEnv of SB3, whose spaces the policy needs")
        for setting in ARGUMENTS_OF_POLICIES & (arguments["policy_kwargs"] or {}).keys():
            raise UserError(f"policy_kwargs have no {setting!r}: the trainer gives it to the policy; leave it out")
        settings["env"] = without_pictures(settings["env"])
        super().__init__(
            **settings,
            **others,
            use_sde=False,
            sde_sample_freq=-1,
            rollout_buffer_class=self.buffer_class,
            _init_setup_model=False,
            supported_action_spaces=ACTION_SPACES,
        )
        if name in SB3_NAMES and self.env is not None:
            check_policy_name(name, self.observation_space, self.action_space, self.policy_kwargs)

    @property
    def acting_policy(self) -> SRWMPolicy:
        """The policy that acts: `policy`, or the copy of it that IMPALA's actors use while the learner runs."""
        return self._actor or self.policy

    @property
    def loss_settings(self) -> Hashable:
        """What `loss` depends on beside the weights and its arguments."""
        return self.vf_coef, self.ent_coef, self.bptt

    @property
    def minibatches_per_update(self) -> int:
        """Number of gradients that are made of a rollout before the next one begins."""
        return 1

    def wait_for_learner(self) -> None:
        """Wait until no other thread is within an update: there is none here."""

    def native_gradient(self, batch: Any, *scalars: float | None) -> Tensor | None:
        """Add the gradient of `loss` in C; None: not possible, and nothing was done. See `engine.Trainer`."""
        return None

    def join(self, processes: ProcessGroup) -> None:
        """Train together with other processes, starting from process 0's weights; call it before `learn`.

        Every process builds its own model, with its own environments and another seed; `n_envs` and `batch_size` are
        per process, `num_timesteps` counts the steps of all. From here on all processes must make the same calls:
        each rollout and each update waits for all of them.
        """
        self.processes = processes
        self._ended_episodes = []
        processes.copy_from_first([*weights_of(self.policy).values()])

    def extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beyond weights, optimizer, counters, generators and environments."""
        return {}

    def restore_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `extra_state` returned."""

    def _setup_model(self) -> None:
        if self.on_nan not in ON_NAN:
            raise UserError(f"on_nan must be one of {', '.join(ON_NAN)}, not {self.on_nan!r}")
        with _memory_errors():
            super()._setup_model()
        self.nan_guard = NanGuard(self.on_nan)
        self.engine = Engine(self)  # type: ignore[arg-type]  # a subclass defines the loss

    def _check_settings(self, counts: Iterable[str], fractions: dict[str, float]) -> None:
        for name in counts:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name, value in fractions.items():
            if not (is_number(value) and 0 <= value <= 1):
                raise UserError(f"{name} must lie in [0, 1], not {value!r}")
        for name in ("ent_coef", "vf_coef"):
            value = getattr(self, name)
            if not (is_number(value) and isfinite(value)):
                raise UserError(f"{name} must be a finite number, not {value!r}")
        # Below 0 the weights would move against the gradient's descent.
        if not (is_number(self.max_grad_norm) and self.max_grad_norm > 0):
            raise UserError(f"max_grad_norm must be above 0, or infinite for no limit, not {self.max_grad_norm!r}")

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        return wrap_env(env, monitor_wrapper)

    def obs_tensor(self, obs: Any) -> Obs:
        """Return observations `[B, ...]` as tensors on the device, dtypes unchanged; on a CPU without a copy."""
        return map_obs(partial(to_device, device=self.device), obs)  # type: ignore[no-any-return]

    def _bootstrap_truncated(
        self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], acted: ActStep, envs: Sequence[int]
    ) -> np.ndarray:
        """Add the discounted value of its last observation to the reward of every episode truncated in step t.

        The core state for that value is the one after step t, not yet reset. Where an environment does not give its
        last observation (ProcGen), the value of the observation before stands in for it.
        """
        truncated = [i for i in dones.nonzero()[0] if infos[i].get("TimeLimit.truncated", False)]
        if not truncated:
            return rewards
        rewards = rewards.astype(np.float32, copy=True)
        known = [i for i in truncated if infos[i].get("terminal_observation") is not None]
        values = acted.values.numpy().copy()
        if known:
            obs = map_obs(lambda *parts: np.stack(parts), *[infos[i]["terminal_observation"] for i in known])
            obs = self.nan_guard.check_arrays("last observation", obs, self.num_timesteps, [envs[i] for i in known])
            with torch.no_grad():
                no_starts = torch.zeros(len(known), device=self.device)
                step = self.acting_policy.act(
                    self.obs_tensor(obs), acted.core_state[:, known], no_starts, deterministic=True
                )
            values[known] = step.values.cpu().numpy()
        rewards[truncated] += self.gamma * values[truncated]
        return rewards

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        for i, info in enumerate(infos):
            if not info:  # as most are
                continue
            done = dones is not None and bool(dones[i])
            if not done and "episode" not in info:
                continue
            if "episode" in info and "game" in info and (done or dones is None):
                info["episode"]["game"] = info["game"]
            if self.processes.size == 1:
                super()._update_info_buffer([info], np.array([done]))
            else:
                ended = {key: info.get(key) for key in ("episode", "is_success")}
                self._ended_episodes.append((self.num_timesteps, ended, done))

    def _gather_episodes(self) -> None:
        """Let process 0 count the episodes of all processes, in the order in which they ended."""
        if self.processes.size > 1:
            gathered, self._ended_episodes = self.processes.gather(self._ended_episodes), []
            for _, info, done in sorted(chain(*gathered), key=itemgetter(0)):
                super()._update_info_buffer([info], np.array([done]))

    def sequences_at_once(self, sequence_length: int) -> int | None:
        """Return how many sequences go through the network at once; None: all, where there are no images."""
        if not self.policy.has_images:
            return None
        if self.frames_at_once is None:  # rounded: IMPALA's sequences are one step longer than its unrolls
            return max(1, round(default_frames_at_once(self.policy, self.device) / sequence_length))
        return max(1, self.frames_at_once // sequence_length)

    def _all_reduce(self, sums: Iterable[Tensor]) -> Tensor:
        """Sum the loss's terms and the gradients over all processes, in place; return the gradient's norm `[]`.

        Process 0 also tells the others how much of the run is left.
        """
        self._progress = self._current_progress_remaining
        parameters = self.engine.parameters
        if self.processes.size > 1:
            progress = torch.full((), self._progress if self.processes.first else 0.0, device=self.device)
            # All processes must send the same tensors; a parameter without gradient has none in any of them.
            grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in parameters]
            self.processes.sum_([progress, *sums, *grads])
            self._progress = progress
        return torch.nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None])

    def planned_steps(self, total_timesteps: int) -> int:
        """Return the steps that training to `total_timesteps` ends with: the last rollout of all processes is whole."""
        rollout = self.n_steps * self.n_envs * self.processes.size
        return self.num_timesteps + ceil((total_timesteps - self.num_timesteps) / rollout) * rollout

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # Not below 0 after a last rollout that goes beyond the total: a rate that decays to 0 would become negative.
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log: SB3's tags, and with several games the mean return of each."""
        episodes = [episode for episode in self.ep_info_buffer or () if "game" in episode]
        games = sorted({episode["game"] for episode in episodes})
        for game in games if len(games) > 1 else ():
            returns = [episode["r"] for episode in episodes if episode["game"] == game]
            self.logger.record(f"rollout/{game}/ep_rew_mean", float(np.mean(returns)))
        super().dump_logs(iteration)

    def _record(self, updates: list[dict[str, float]], others: dict[str, float | None]) -> None:
        """Log the means of updates, the loss's terms by SB3's tags, other values, and what SB3 logs beside them."""
        means = {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
        policy_loss, entropy = means.pop("policy_loss"), means.pop("entropy")
        loss = policy_loss + self.vf_coef * means["value_loss"] - self.ent_coef * entropy
        values = {**means, "policy_gradient_loss": policy_loss, "entropy_loss": -entropy, "loss": loss, **others}
        if hasattr(self.policy, "log_std"):
            values["std"] = self.policy.log_std.exp().mean().item()
        if self.nan_guard.skipped:
            values["skipped"] = float(self.nan_guard.skipped)
        for name, value in values.items():
            if value is not None:
                self.logger.record(name if "/" in name else f"train/{name}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def learn(
        self: SelfRecurrent,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfRecurrent:
        """Train for `total_timesteps` environment steps; arguments as in SB3.

        Raises:
            Exception: whatever went wrong, in the learner's or an environment's thread too.
        """
        name = tb_log_name or type(self).__name__
        with _memory_errors(), self._learner():
            return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        if self.env is None:
            raise UserError("there are no environments to learn in: give load(..., env=...), or call set_env(env)")
        if is_autocast(next(self.policy.parameters())):
            raise UserError(
                "learn does not run under torch.autocast: call it outside; a CNN runs in bfloat16 by "
                "policy_kwargs={'encoder_kwargs': {'cnn': {'precision': 'bfloat16'}}}"
            )
        result = super()._setup_learn(*args, **kwargs)
        warn_of_unused_masks(self.env)
        warn_of_symbols(self._last_obs, self.policy)
        envs = range(self.n_envs)  # of later observations this is checked where they are collected
        check_obs(self._last_obs, self.observation_space, self.num_timesteps, envs)
        self._last_obs = self.nan_guard.check_arrays("observation", self._last_obs, self.num_timesteps, envs)
        return result

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | bool | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Act as `SRWMPolicy.predict` does."""
        return self.policy.predict(observation, state, episode_start, deterministic, action_masks)

    def _learner(self) -> AbstractContextManager[None]:
        """Return the context of `learn`: there is no other thread."""
        return nullcontext()

    @classmethod
    def load(
        cls: type[SelfRecurrent],
        path: Any,
        env: GymEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfRecurrent:
        """Load a zip that `save` wrote; arguments as in SB3. Run it only on files you trust: a zip can run code.

        Raises:
            UserError: a keyword that is no setting of the class, or one of an optimizer whose state the zip holds.
        """
        _refuse(cls, {name: value for name, value in kwargs.items() if name not in _parameters(cls)})
        for name in cls.fixed_by_zip:
            if name in kwargs:
                raise UserError(
                    f"{name} is part of the optimizer's state: set it in model.policy.optimizer.param_groups"
                )
        # Zips of earlier versions name the buffer's class by a path that is gone; the constructor sets it.
        custom_objects = {"rollout_buffer_class": cls.buffer_class, **(custom_objects or {})}
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *NOT_SAVED]


def _refuse(algorithm: type[Any], settings: dict[str, Any]) -> None:
    """Raise a `UserError` for settings that an algorithm has not, unless they ask for what it does anyway."""
    for name, value in settings.items():
        check_settings(algorithm.__name__, [name], _parameters(algorithm) | UNSUPPORTED.keys())
        wanted, reason = UNSUPPORTED[name]
        if value is not None and value != wanted:
            raise UserError(f"{name}={value!r}: {reason}; leave it out")


def _parameters(algorithm: type[Any]) -> set[str]:
    """Return the settings of an algorithm; a subclass may forward some to those that it is derived from."""
    own = takewhile(lambda of: of is not RecurrentAlgorithm, algorithm.__mro__)
    names = {name for of in own if "__init__" in vars(of) for name in inspect.signature(of).parameters}
    return names - {"_init_setup_model", "unsupported", "args", "kwargs"}


def is_number(value: Any) -> bool:
    """Return whether a setting is a number, of NumPy too."""
    return isinstance(value, Real)


def with_optimizer_kwargs(policy_kwargs: dict[str, Any] | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return settings of the policy with defaults for those of its optimizer that they leave open."""
    given = policy_kwargs or {}
    return {**given, "optimizer_kwargs": {**defaults, **(given.get("optimizer_kwargs") or {})}}


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Say in one line that memory is exhausted."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            "the network and one rollout need more memory than there is: use a smaller network, fewer n_envs, n_steps "
            f"or frames_at_once ({str(error).splitlines()[0]})"
        ) from error
