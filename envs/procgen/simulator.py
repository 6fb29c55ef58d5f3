"""ProcGen's C++ library through either of its Python packages: `procgen` (by gym3) or `procgen_gym` (by ctypes)."""

from __future__ import annotations

import ctypes
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from packaging.requirements import Requirement

from srwm_rl.envs.batch import Array
from srwm_rl.errors import UserError

MAX_STATE_SIZE = 2**20  # bytes, as in procgen/env.py


class Distribution(NamedTuple):
    """The installed package that ProcGen comes from."""

    module: str  # "procgen" or "procgen_gym"
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


# The first two are one library; the third draws some games slightly differently, with the same levels and dynamics.
_DISTRIBUTIONS = (("procgen", "procgen"), ("procgen", "procgen-mirror"), ("procgen_gym", "procgen-gym"))


def find_distribution() -> Distribution | None:
    """Return the distribution that ProcGen is played with; None: it is not installed."""
    for module, name in _DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            if find_spec(module) is not None:
                return Distribution(module, name, metadata.version(name))
    return Distribution("procgen", "procgen", "of unknown version") if find_spec("procgen") is not None else None


def installed_distribution() -> Distribution:
    """Return the distribution that ProcGen is played with.

    Raises:
        UserError: ProcGen is not installed.
    """
    distribution = find_distribution()
    if distribution is None:
        raise UserError(why_missing())
    return distribution


def why_missing() -> str:
    """Return what to do where ProcGen is not installed."""
    for requirement in map(Requirement, metadata.requires("srwm-rl") or ()):
        if requirement.name.startswith("procgen") and requirement.marker and requirement.marker.evaluate({"extra": ""}):
            return f"ProcGen is not installed; run: pip install '{requirement.name}{requirement.specifier}'"
    return (
        "ProcGen has no wheels for this Python and platform (docs/procgen.md): choose another environment, see "
        "srwm-rl train --env-list"
    )


class Simulator(ABC):
    """n games that step together; all arrays have the games as their first axis.

    `act` starts a step, `observe` awaits it.
    """

    @abstractmethod
    def act(self, actions: Array) -> None:
        """Act in every game, `[n]`; -1 ends an episode at once."""

    @abstractmethod
    def observe(self) -> tuple[Array, Array, Array]:
        """Return the rewards `[n]`, new arrays of the frames `[n, 64, 64, 3]`, and where an episode begins `[n]`."""

    @abstractmethod
    def info(self, key: str) -> Array:
        """Return a copy of ProcGen's information after the last `observe`, such as `level_seed` `[n]`."""

    @abstractmethod
    def get_state(self, i: int) -> bytes:
        """Return game i's state."""

    @abstractmethod
    def set_state(self, i: int, state: bytes) -> None:
        """Continue game i from a state of the same game, mode and options, of either package."""

    @abstractmethod
    def close(self) -> None:
        """Free the C++ environments."""


def make_simulator(games: Sequence[str], n: int, **options: Any) -> Simulator:
    """Start n games, `games[i % len(games)]` as game i; `options` are those of ProcGen's constructor.

    Raises:
        UserError: ProcGen is not installed.
    """
    simulator: Any = {"procgen": Gym3Simulator, "procgen_gym": CtypesSimulator}[installed_distribution().module]
    return simulator(games, n, **options)  # type: ignore[no-any-return]


class Gym3Simulator(Simulator):
    """`procgen.ProcgenGym3Env` of the packages procgen and procgen-mirror."""

    def __init__(self, games: Sequence[str], n: int, **options: Any) -> None:
        # Here: not every platform has ProcGen. Its import leaves a file open, which a strict Python reports.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            from procgen import ProcgenGym3Env
        self.env: Any = ProcgenGym3Env(num=n, env_name=",".join(games), **options)
        # cffi looks a function up under a lock at its first use. If the garbage collector closes an old environment
        # while a new one is being built, which holds that lock, the process hangs; so look `close` up now.
        _ = self.env._c_lib.libenv_close

    def act(self, actions: Array) -> None:
        """See `Simulator.act`."""
        self.env.act(actions)

    def observe(self) -> tuple[Array, Array, Array]:
        """See `Simulator.observe`."""
        rewards, obs, first = self.env.observe()
        return rewards, obs["rgb"], first

    def info(self, key: str) -> Array:
        """See `Simulator.info`."""
        # gym3's get_info() would build one dict per environment from these arrays.
        values: Array = self.env._info[key]
        return values.copy()

    def get_state(self, i: int) -> bytes:
        """See `Simulator.get_state`."""
        buffer = self.env._ffi.new("char[]", MAX_STATE_SIZE)
        size = self.env.call_c_func("get_state", i, buffer, MAX_STATE_SIZE)
        return bytes(self.env._ffi.buffer(buffer, size))

    def set_state(self, i: int, state: bytes) -> None:
        """See `Simulator.set_state`."""
        self.env.call_c_func("set_state", i, state, len(state))

    def close(self) -> None:
        """See `Simulator.close`."""
        self.env.close()


class CtypesSimulator(Simulator):
    """`procgen_gym.ProcgenVecEnv`, whose instances play one game each: one instance for each of the games.

    Levels are drawn as by `Gym3Simulator`: with several games, each starts from the state that an instance of all n
    would have given it.
    """

    def __init__(self, games: Sequence[str], n: int, num_threads: int = 0, **options: Any) -> None:
        from procgen_gym import ProcgenVecEnv

        self._n, self._k, self._buffer = n, len(games), ctypes.create_string_buffer(MAX_STATE_SIZE)
        threads = num_threads and max(1, num_threads // self._k)
        self._envs: list[Any] = []
        for j, game in enumerate(games):
            states: Iterable[bytes] = ()
            if self._k > 1:
                whole = ProcgenVecEnv(n, game, num_threads=0, **options)
                states = [self._read(whole._clib, i) for i in range(j, n, self._k)]
                whole.close()
            env = ProcgenVecEnv(n // self._k, game, num_threads=threads, **options)
            for slot, state in enumerate(states):
                env._clib.call_c_func("set_state", slot, state, len(state))
            self._envs.append(env)

    def act(self, actions: Array) -> None:
        """See `Simulator.act`."""
        for j, env in enumerate(self._envs):
            env._clib.act(np.asarray(actions[j :: self._k], np.int32))

    def observe(self) -> tuple[Array, Array, Array]:
        """See `Simulator.observe`."""
        firsts, observations, rewards, _ = zip(*(env._clib.observe() for env in self._envs), strict=True)
        frames = self._interleave([obs["rgb"] for obs in observations])
        return self._interleave(rewards), frames, self._interleave(firsts) != 0

    def info(self, key: str) -> Array:
        """See `Simulator.info`."""
        return self._interleave([env._clib.get_info_bufs()[key] for env in self._envs]).copy()

    def get_state(self, i: int) -> bytes:
        """See `Simulator.get_state`."""
        return self._read(self._envs[i % self._k]._clib, i // self._k)

    def set_state(self, i: int, state: bytes) -> None:
        """See `Simulator.set_state`."""
        self._envs[i % self._k]._clib.call_c_func("set_state", i // self._k, state, len(state))

    def close(self) -> None:
        """See `Simulator.close`."""
        for env in self._envs:
            env.close()

    def _read(self, library: Any, slot: int) -> bytes:
        size = library.call_c_func("get_state", slot, self._buffer, MAX_STATE_SIZE)
        return ctypes.string_at(self._buffer, size)

    def _interleave(self, parts: Sequence[Array]) -> Array:
        """Return the games' arrays `[n / k, ...]` as one `[n, ...]`, in which they take turns."""
        if self._k == 1:
            return parts[0]
        whole = np.empty((self._n, *parts[0].shape[1:]), parts[0].dtype)
        for j, part in enumerate(parts):
            whole[j :: self._k] = part
        return whole
