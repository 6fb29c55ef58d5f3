"""POPGym's RepeatPrevious: say the suit of a card some steps back in a shuffled deck."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from srwm_rl.envs.batch import Acted, Array, FloatArray, check_count
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange, hash_integers
from srwm_rl.envs.tasks.base import TaskBatch
from srwm_rl.errors import UserError

SUITS, CARDS = 4, 52


class RepeatPreviousBatch(TaskBatch):
    """Name the suit of the card `k - 1` steps back.

    The rules are those of `RepeatPrevious` in popgym 1.0.7, `popgym/envs/repeat_previous.py` (Morad et al., 2023,
    https://arxiv.org/abs/2303.01859); the defaults are `popgym-RepeatPreviousEasy-v0`, `n_decks=2, k=32` Medium and
    `n_decks=3, k=64` Hard. Each step shows one card's suit of `n_decks` shuffled decks. From the k-th card on, an
    answer is compared with the k-th newest of the cards shown so far, the present one counted: k = 1 asks for the
    present card, k = 4 for the one 3 steps back. A right one pays `1 / (52 n_decks - k)`, a wrong one costs as much,
    and the episode ends before the last card is played: perfect play earns 1, random play -1/2. Only the shuffles
    differ: a level's deck is a function of the level.

    Observations: float32 `[n, 4]`, the suit as a one-hot. Actions: one of 4 suits.

    Args:
        n_envs: How many environments.
        levels: The levels that episodes are drawn from; a level fixes the shuffled deck.
        seed: Start of the random level sequences.
        k: Which of the newest cards is asked for.
        n_decks: Decks of 52 cards that are shuffled together.

    Raises:
        UserError: There are not more cards than `k`.
    """

    games = ("repeat_previous",)
    has_answers = True
    # An agent without memory can carry a card from step to step as an action that it is then shown; the control
    # without memory should not be able to.
    memory_inputs: ClassVar[tuple[str, ...]] = ("step",)

    def __init__(
        self, n_envs: int, levels: str | LevelRange = "all", seed: int = 0, k: int = 4, n_decks: int = 1
    ) -> None:
        self.k, self.n_cards = check_count("k", k), CARDS * check_count("n_decks", n_decks)
        if self.k >= self.n_cards:
            raise UserError(f"k must be below the {self.n_cards} cards of n_decks {n_decks}, not {k}")
        super().__init__(n_envs, levels, seed, SUITS, SUITS, self.k, self.n_cards)

    @classmethod
    def score_range(cls, **settings: int) -> tuple[float, float]:
        """Return the mean returns of a random and of the best possible agent."""
        return -0.5, 1.0

    @classmethod
    def feature_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return the names of an observation's numbers."""
        return tuple(f"suit {i}" for i in range(SUITS))

    @classmethod
    def action_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return the names of the actions."""
        return cls.feature_names()

    def _begin_episodes(self, mask: BoolArray) -> None:
        order = hash_integers(self._level[:, None], np.arange(self.n_cards)).argsort(axis=1)
        self._suits = order % SUITS  # [n, n_cards]

    def observe(self) -> FloatArray:
        """Return the suits of the present cards, `[n, 4]`."""
        obs = np.zeros((self.n_envs, SUITS), np.float32)
        rows = np.arange(self.n_envs)
        obs[rows, self._suits[rows, self._clock]] = 1.0
        return obs

    def answers(self) -> IntArray:
        """Return the suits of the k-th newest cards, `[n]`; -1 before there is one."""
        asked = self._clock - self.k + 1
        suits = self._suits[np.arange(self.n_envs), np.maximum(asked, 0)]
        return np.where(asked >= 0, suits, -1)

    def _act(self, actions: Array) -> Acted:
        answers = self.answers()
        worth = (answers >= 0) / (self.n_cards - self.k)
        rewards = np.where(actions == answers, worth, -worth).astype(np.float32)
        return rewards, self._clock == self.n_cards - 2, np.zeros(self.n_envs, np.bool_), None
