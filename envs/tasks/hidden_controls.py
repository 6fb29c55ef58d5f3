"""A room whose controls are hidden: find out which action moves where, and go to the goal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from srwm_rl.envs.batch import Array, FloatArray, check_count, check_count_or_zero
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange, check_levels, hash_integers, hash_uniform
from srwm_rl.envs.tasks.attempts import AttemptsTask
from srwm_rl.errors import UserError

MOVES: IntArray = np.array([[-1, 0], [0, -1], [0, 1], [1, 0], [-1, -1], [-1, 1], [1, -1], [1, 1]])  # rows, columns
CONTROLS, START, GOAL, FLASH = range(4)  # second keys of the hashes


class HiddenControlsBatch(AttemptsTask):
    """Reach a goal in a room, `attempts` times in one episode; which action makes which move is drawn per level.

    The room has `size` x `size` cells. Start and goal are drawn for every attempt. A step costs 1 / `attempt_steps`,
    the goal pays 1 and ends the attempt; a move into a wall moves along it or not at all. The controls stay the same
    over the attempts, so an agent that finds them out early earns more later: it knows the goal's direction, but not
    which action leads there.

    Observations: float32 `[n, 4 * size + 5 (+ 1 with flash)]`: offset of the goal from the agent as two one-hots
    (rows, columns) of -(size - 1) .. size - 1 | attempt begins | with `effect` the displacement that the last move
    caused, two one-hots of -1, 0, 1 (zeros before the first move) | with `flash` the flash.

    Args:
        n_envs: How many environments.
        levels: The levels that episodes are drawn from; a level fixes the controls, starts, goals and flashes.
        seed: Start of the random level sequences.
        size: Cells along a side, 2 or more.
        n_moves: 4, or 8 with the diagonal ones; as many actions.
        attempts: Attempts per episode.
        attempt_steps: Steps after which an attempt ends without the goal.
        effect: Whether the effect of the last move is observed.
        change_at: The attempt (the first is 0) from which on the controls are newly drawn ones, unannounced; 0: none.
        flash: A flash is shown every so many steps on average, and turns the controls round from that step on, until
            the next one: each action moves the opposite way; 0: none.
        render_mode: "rgb_array": `render` draws the room, with what each action does.

    Raises:
        UserError: If a setting is out of range.
    """

    games = ("hidden_controls",)
    memory_inputs = ("action", "reward")
    draws_controls = True

    def __init__(
        self,
        n_envs: int,
        levels: str | LevelRange = "all",
        seed: int = 0,
        size: int = 5,
        n_moves: int = 4,
        attempts: int = 6,
        attempt_steps: int = 12,
        effect: bool = True,
        change_at: int = 0,
        flash: int = 0,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise UserError(f"hidden_controls has no render_mode {render_mode!r}; use 'rgb_array' or None")
        self.render_mode = render_mode
        self.size, self.n_moves = _check_room(size, n_moves)
        if not isinstance(effect, bool):
            raise UserError(f"effect must be true or false, not {effect!r}")
        self.effect = effect
        self.change_at = check_count_or_zero("change_at", change_at)
        self.flash = check_count_or_zero("flash", flash)
        if self.change_at >= check_count("attempts", attempts) > 0:
            raise UserError(f"change_at must be below the {attempts} attempts (the first is 0), not {change_at}")
        n_features = 2 * (2 * self.size - 1) + 1 + 6 * effect + bool(self.flash)
        settings = (self.size, self.n_moves, effect, self.change_at, self.flash)
        super().__init__(n_envs, levels, seed, n_features, self.n_moves, attempts, attempt_steps, *settings)

    @classmethod
    def feature_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return the names of an observation's numbers."""
        env = cls(1, **settings)
        goal = [f"goal {axis} {i:+d}" for axis in ("row", "column") for i in range(1 - env.size, env.size)]
        moved = [f"moved {axis} {i:+d}" for axis in ("row", "column") for i in (-1, 0, 1)]
        return (*goal, "attempt begins", *moved * env.effect, *["flash"] * bool(env.flash))

    @classmethod
    def score_range(cls, **settings: Any) -> tuple[float, float]:
        """Return the mean returns of a random agent and of one that knows the controls, both exact."""
        env = cls(1, **settings)
        random = _random_returns(env.size, env.n_moves, env.attempt_steps)
        cells = np.arange(env.size**2)
        optimum = env._optimum(cells[:, None], cells)
        others = cells[:, None] != cells
        return env.attempts * float(random[others].mean()), env.attempts * float(optimum[others].mean())

    @classmethod
    def reference_returns(cls, levels: Sequence[int] | IntArray | LevelRange, **settings: Any) -> dict[str, FloatArray]:
        """Return the returns of an agent that knows the controls, which goes to every goal on a shortest way."""
        env, levels = cls(1, **settings), check_levels(levels)
        starts, goals = env._places(levels[:, None], np.arange(env.attempts))
        return {"knows the controls": env._optimum(starts, goals).sum(axis=1).astype(np.float32)}

    def _optimum(self, starts: IntArray, goals: IntArray) -> Array:
        """Return the highest return of an attempt between cells, elementwise."""
        ways = np.abs(self._cell(starts) - self._cell(goals))
        steps = ways.sum(-1) if self.n_moves == 4 else ways.max(-1)
        optimum: Array = np.where(steps <= self.attempt_steps, 1.0 - steps / self.attempt_steps, -1.0)
        return optimum

    def _cell(self, cells: IntArray) -> IntArray:
        """Return row and column of numbered cells, `[..., 2]`."""
        return np.stack((cells // self.size, cells % self.size), axis=-1)

    def _places(self, levels: IntArray, attempts: IntArray) -> tuple[IntArray, IntArray]:
        """Return the numbers of the cells where attempts start, and of their goals."""
        n = self.size**2
        starts = (hash_integers(levels, START, attempts) % np.uint64(n)).astype(np.int64)
        away = (hash_integers(levels, GOAL, attempts) % np.uint64(n - 1)).astype(np.int64)
        return starts, (starts + 1 + away) % n

    def _start(self) -> None:
        self._agent, self._goal, self._effect = np.zeros((3, self.n_envs, 2), np.int64)
        self._controls = np.zeros((self.n_envs, self.n_moves), np.int64)  # the move that each action makes
        super()._start()

    def _begin_attempts(self, rows: IntArray) -> None:
        starts, goals = self._places(self._level[rows], self._attempt[rows])
        self._agent[rows], self._goal[rows] = self._cell(starts), self._cell(goals)
        self._draw_controls(rows)

    def _draw_controls(self, rows: IntArray) -> None:
        changed = (self._attempt[rows] >= self.change_at) & (self.change_at > 0)
        keys = hash_integers(
            self._level[rows, None], CONTROLS, changed[:, None].astype(np.int64), np.arange(self.n_moves)
        )
        self._controls[rows] = keys.argsort(axis=1)

    def _flashes(self) -> tuple[BoolArray, BoolArray]:
        """Return whether the flash is shown at the present step, and whether the controls are turned round, `[n]`."""
        steps = np.arange(1, self.attempts * self.attempt_steps + 1)  # none at step 0
        flashes = (hash_uniform(self._level[:, None], FLASH, steps) < 1 / self.flash) & (steps <= self._clock[:, None])
        shown = (flashes & (steps == self._clock[:, None])).any(axis=1)
        return shown, flashes.sum(axis=1) % 2 == 1

    def observe(self) -> FloatArray:
        """Return the present observations, `[n, n_features]`; see the class."""
        rows, obs = np.arange(self.n_envs), np.zeros((self.n_envs, *self.observation_space.shape), np.float32)  # type: ignore[misc]
        width = 2 * self.size - 1
        offset = self._goal - self._agent + self.size - 1
        obs[rows, offset[:, 0]] = 1.0
        obs[rows, width + offset[:, 1]] = 1.0
        obs[:, 2 * width] = self._attempt_clock == 0
        if self.effect:
            moved = np.flatnonzero(self._clock > 0)
            obs[moved, 2 * width + 2 + self._effect[moved, 0]] = 1.0
            obs[moved, 2 * width + 5 + self._effect[moved, 1]] = 1.0
        if self.flash:
            obs[:, -1] = self._flashes()[0]
        return obs

    def _moves(self) -> IntArray:
        """Return what each action does at the present step, `[n, n_moves, 2]`."""
        moves: IntArray = MOVES[self._controls]
        return np.where(self._flashes()[1][:, None, None], -moves, moves) if self.flash else moves

    def _act_in_attempt(self, actions: Array) -> tuple[FloatArray, BoolArray]:
        moves = self._moves()[np.arange(self.n_envs), actions]  # [n, 2]
        to = np.clip(self._agent + moves, 0, self.size - 1)
        self._effect[:] = to - self._agent
        self._agent[:] = to
        reached = (to == self._goal).all(axis=1)
        return (reached - 1 / self.attempt_steps).astype(np.float32), reached

    def render(self) -> npt.NDArray[np.uint8]:
        """Return a picture of every room, `[n, 512, 512, 3]`, as it is before the next step."""
        if self.render_mode is None:
            return super().render()
        from srwm_rl.envs.tasks.room_picture import draw_room

        came_from = self._agent - self._effect
        shown = self._flashes()[0] if self.flash else np.zeros(self.n_envs, np.bool_)
        pictures = [
            draw_room(
                *(self.size, self._agent[i], self._goal[i], came_from[i] if self._attempt_clock[i] else None),
                *(moves, bool(shown[i])),
            )
            for i, moves in enumerate(self._moves())
        ]
        return np.stack(pictures)

    def _arrays(self) -> dict[str, Array]:
        return {**super()._arrays(), "agent": self._agent, "goal": self._goal, "effect": self._effect}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where `get_state` was called, in whichever instance; see `BatchEnv.set_state`."""
        super().set_state(state)
        self._draw_controls(np.arange(self.n_envs))  # those of the present attempts


def _check_room(size: int, n_moves: int) -> tuple[int, int]:
    if check_count("size", size) < 2:
        raise UserError("size must be 2 or more: in one cell there is nowhere to go")
    if check_count("n_moves", n_moves) not in (4, 8):
        raise UserError(f"n_moves must be 4, or 8 with the diagonal moves, not {n_moves}")
    return size, n_moves


def _random_returns(size: int, n_moves: int, n_steps: int) -> Array:
    """Return the mean return of random actions in one attempt from every cell to every goal, `[cells, goals]`."""
    cells = np.arange(size**2)
    rows, columns = (
        np.clip(part[:, None] + MOVES[:n_moves].T[i], 0, size - 1) for i, part in enumerate(divmod(cells, size))
    )
    to = rows * size + columns  # [cells, moves]
    reached = to[:, :, None] == cells  # [cells, moves, goals]
    returns = np.zeros((size**2, size**2))
    for _ in range(n_steps):
        returns = np.where(reached, 1.0, returns[to]).mean(axis=1) - 1 / n_steps
    return returns
