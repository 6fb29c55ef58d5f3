"""The 16 ProcGen games (https://github.com/openai/procgen) with a true reset, chosen levels and exact states."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from gymnasium import spaces

from srwm_rl.envs.batch import Array, BatchEnv, BatchStep, State, check_count
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange
from srwm_rl.envs.processors import share_of_processors
from srwm_rl.envs.procgen.games import MODE_NUMBERS, check_options, check_switch, level_range, parse_games, timeout
from srwm_rl.envs.procgen.simulator import Simulator, installed_distribution, make_simulator
from srwm_rl.envs.procgen.state import check_state, digest
from srwm_rl.errors import UserError

logger = logging.getLogger(__name__)
EARLIER = "procgen"  # the package of saved states that do not name it
_RESET = -1  # ProcGen's action that ends the episode at once (Game::step in procgen/src/game.cpp)


class ProcgenBatch(BatchEnv):
    """Play ProcGen games; environment i plays game `i % len(games)`.

    Observations are uint8 `[n, 64, 64, 3]` (a fresh array per step), actions whole numbers in 0 .. 14. ProcGen starts
    the next episode within the step that ends one and never draws the last frame, so there is no `final_obs`.
    `is_success` is ProcGen's `prev_level_complete`, which every game sets when its goal is reached
    (`step_data.level_complete` in procgen/src/games/*.cpp), be it a coin, the last enemy or a quota of fish.

    Args:
        games: A game, "coinrun,maze", a list of games, or a game set ("paper6", "all16").
        n_envs: How many environments; a multiple of the number of games.
        levels: The levels that episodes are drawn from.
        mode: easy, hard, extreme, memory or exploration, where the games have it.
        seed: Start of the random level sequences.
        n_threads: C++ threads; None: one for each processor that this process may use, shared among the processes that
            torchrun started on this machine, at most 8.
        timeout_as_truncation: Report an episode that ran out of time as truncated. By default it is terminated, as in
            every published result. An episode that fails in its very last step counts as out of time.
        render_mode: "rgb_array" draws 512x512 frames at every step, 20 times slower: not for training.
        options: ProcGen's own switches, such as `use_backgrounds=False` (see `procgen.games.OPTIONS`).

    Raises:
        UserError: If an argument is wrong or ProcGen is not installed.
    """

    supports_state = True

    def __init__(
        self,
        games: str | Sequence[str],
        n_envs: int,
        levels: str | LevelRange = "all",
        mode: str = "easy",
        seed: int = 0,
        n_threads: int | None = None,
        timeout_as_truncation: bool = False,
        render_mode: str | None = None,
        **options: bool,
    ) -> None:
        self.games = parse_games(games)
        levels = level_range(self.games, mode, levels)
        if extra := check_count("n_envs", n_envs) % (n_games := len(self.games)):
            near = n_envs + n_games - extra
            raise UserError(f"n_envs={n_envs} must be a multiple of the {n_games} games, such as {near}")
        if render_mode not in (None, "rgb_array"):
            raise UserError(f"ProcGen has no render_mode {render_mode!r}; use 'rgb_array' or None")
        self.mode = mode
        self.render_mode = render_mode
        self.options = check_options(options)
        self.solvable = not self.options["use_sequential_levels"]
        self.timeout_as_truncation = check_switch("timeout_as_truncation", timeout_as_truncation)
        self.n_threads = _thread_count(n_threads, n_envs)
        self.distribution = installed_distribution()
        self._env: Simulator | None = None
        frame = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        super().__init__(n_envs, frame, spaces.Discrete(15), levels, seed)
        self._timeouts = np.array([timeout(game, mode) for game in self.game_names])

    def _start(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env = self._make(self.games, self.n_envs, self.levels, self.n_threads, self.render_mode)
        self._pins: IntArray = np.full(self.n_envs, -1, np.int64)
        # States of the environments before they were pinned, with their level range and random sequence.
        self._own_states: list[bytes] = [b""] * self.n_envs

    def _make(
        self, games: Sequence[str], n: int, levels: LevelRange, n_threads: int, render_mode: str | None = None
    ) -> Simulator:
        return make_simulator(
            games,
            n,
            num_levels=len(levels),
            start_level=levels.start,
            # Exploration is one hard level; procgen itself refuses the mode together with a level.
            distribution_mode="hard" if self.mode == "exploration" else self.mode,
            rand_seed=self.seed,
            num_threads=n_threads,
            render_mode=render_mode,
            **self.options,
        )

    @property
    def _simulator(self) -> Simulator:
        assert self._env is not None
        return self._env

    def step(self, actions: Array) -> BatchStep:
        """Act in every environment; see `BatchEnv.step`."""
        self._simulator.act(self.check_actions(actions))
        rewards, frames, first = self._simulator.observe()
        self._fresh = False
        info: dict[str, Array] = {key: self._simulator.info(key) for key in ("level_seed", "prev_level_seed")}
        complete = self._simulator.info("prev_level_complete").astype(np.bool_)
        if self.solvable:
            info["is_success"] = complete
        self._clock += 1
        truncated = np.zeros(self.n_envs, np.bool_)
        if self.timeout_as_truncation:
            truncated = first & (self._clock >= self._timeouts) & ~complete
        self._clock[first] = 0
        return BatchStep(frames, rewards, first & ~truncated, truncated, info)

    def observe(self) -> Array:
        """Return the current frames without stepping."""
        return self._simulator.observe()[1]

    def level_seed(self) -> IntArray:
        """Return the levels being played, `[n]`."""
        self._simulator.observe()
        return self._simulator.info("level_seed").astype(np.int64)

    def render(self) -> Array:
        """Return a picture `[n, 512, 512, 3]` of every environment."""
        if self.render_mode is None:
            return super().render()
        self._simulator.observe()
        return self._simulator.info("rgb")

    def close(self) -> None:
        """Free the C++ environments."""
        self._simulator.close()

    def _restart(self, mask: BoolArray, levels: IntArray | None) -> None:
        if levels is not None and self.options["use_sequential_levels"]:
            raise UserError("levels cannot be chosen with use_sequential_levels, which moves on from level to level")
        for i in np.flatnonzero(mask).tolist():
            if levels is not None:
                if self._pins[i] < 0:
                    self._own_states[i] = self._simulator.get_state(i)
                level = int(levels[i])
                self._simulator.set_state(i, self._begin_alone(i, LevelRange(level, level + 1)))
            else:
                if self._pins[i] >= 0:
                    self._simulator.set_state(i, self._own_states[i])
                    self._own_states[i] = b""
                if not mask.all():  # an action in the common instance would step all environments
                    self._simulator.set_state(i, self._begin_alone(i, self.levels, after=self._simulator.get_state(i)))
        self._pins[mask] = -1 if levels is None else levels[mask]
        if levels is None and mask.all():
            self._simulator.act(np.full(self.n_envs, _RESET))

    def _begin_alone(self, i: int, levels: LevelRange, after: bytes | None = None) -> bytes:
        """Return environment i's state at an episode's start in a new instance with these levels.

        It is the first episode, or the one that comes after the state `after`.
        """
        simulator = self._make([self.game_names[i]], 1, levels, n_threads=0)  # half a millisecond
        if after is not None:
            simulator.set_state(0, after)
            simulator.act(np.array([_RESET]))
        state = simulator.get_state(0)
        simulator.close()
        return state

    def _settings(self) -> State:
        return {**super()._settings(), "mode": self.mode, "options": repr(sorted(self.options.items()))}

    def _arrays(self) -> dict[str, Array]:
        return {**super()._arrays(), "pins": self._pins}

    def get_state(self) -> State:
        """Return everything that decides what happens next, without pickles."""
        states, own = [self._simulator.get_state(i) for i in range(self.n_envs)], list(self._own_states)
        blobs = {"states": states, "own_states": own, "digest": digest([*states, *own])}
        return {**super().get_state(), **blobs, "library": self.distribution.module}

    def set_state(self, state: State) -> None:
        """Continue exactly where `get_state` was called, in whichever instance; see `BatchEnv.set_state`.

        A state of the other ProcGen package is continued with a warning: it draws some games slightly differently.
        """
        super().set_state(state)
        library = state.get("library", EARLIER)
        if library != self.distribution.module:
            logger.warning(
                "these environments were saved with the package %s and go on with %s, which draws some games slightly "
                "differently: the same levels and dynamics, but not exactly the same run",
                library,
                self.distribution,
            )
        for i, data in enumerate(state["states"]):
            self._simulator.set_state(i, data)
        self._own_states = list(state["own_states"])

    def _check_state(self, state: State) -> None:
        state = {"library": EARLIER, **state} if isinstance(state, dict) else state
        super()._check_state(state)
        if state["library"] not in ("procgen", "procgen_gym"):
            raise UserError(f"the saved state is of {state['library']!r}, which is no package of ProcGen")
        for key in ("states", "own_states"):
            blobs = state[key]
            if not isinstance(blobs, list) or [type(blob) for blob in blobs] != [bytes] * self.n_envs:
                raise UserError(f"the saved state's {key!r} must be a list of {self.n_envs} bytes objects")
        own, number = (self.levels.start, self.levels.stop), MODE_NUMBERS[self.mode]
        for i, (name, pin) in enumerate(zip(self.game_names, state["pins"].tolist(), strict=True)):
            check_state(state["states"][i], name, number, own if pin < 0 else (pin, pin + 1))
            if pin >= 0:
                check_state(state["own_states"][i], name, number, own)
        if state["digest"] != digest([*state["states"], *state["own_states"]]):
            raise UserError("the saved state's bytes have changed since it was saved; use an undamaged checkpoint")


def _thread_count(n_threads: int | None, n_envs: int) -> int:
    if n_threads is None:
        n_threads = 0 if n_envs == 1 else min(share_of_processors(), n_envs, 8)  # one is faster without
    return 0 if n_threads == 0 else check_count("n_threads", n_threads)
