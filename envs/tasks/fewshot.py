"""Few-shot learning as an environment: images with labels, then the question which label an image has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from srwm_rl.envs.batch import Acted, Array, FloatArray, check_count, check_count_or_zero
from srwm_rl.envs.fewshot.baselines import reference_answers
from srwm_rl.envs.fewshot.episodes import (
    LEVELS_PER_SPLIT,
    Episodes,
    Protocol,
    draw_episodes,
    split_of,
    splits_of,
)
from srwm_rl.envs.images.data import load_together
from srwm_rl.envs.images.image_set import SPLITS
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange, check_levels
from srwm_rl.envs.tasks.base import TaskBatch
from srwm_rl.errors import UserError, did_you_mean

FORMATS = ("ask", "sync", "delayed")
DRAWN_AHEAD = 8  # episodes of every environment


class FewShotBatch(TaskBatch):
    """Learn classes of images from a few examples, within one episode.

    An episode draws `ways` classes and gives each a label at random. It shows `shots` examples of each in random
    order, then `queries` further images; the action is the label that the image is thought to have. A right answer
    where one is asked for pays 1 / (such steps in the episode), so that a return is an accuracy. Which label goes with
    which class is new in every episode, so only a memory that learns while the episode runs does better than chance.

    Label formats: "ask" shows each example without its label, asking for it, then again with its label. "sync" and
    "delayed" are those of the official code (IDSIA/modern-srwm, supervised_learning): "sync" shows each example with
    its label, asks for the queries alone, and shows label 0 beside them; "delayed" shows beside each image the label
    of the one before (0 at the first), and asks at every step.

    With two data sets, as "glyphs,digits", an episode has two parts in random order, both with the same labels, and
    nothing marks the border (sequential adaptation); the last 0 .. `cut` examples of each part are left out. The
    queries of both parts follow the second.

    Levels 0:1000000 draw the training classes, 1000000:2000000 those of validation, 2000000:3000000 those of the
    test, later ones training classes again.

    Observations: Dict of `image` uint8 `[height, width, channels]` and `label` float32 `[outputs]`, one-hot or zeros.
    A step's info has, for the image acted on: `asked` (bool), `seen` (int64: examples of its class shown before),
    `query` (bool), `part`, `data_set` and `position` (int64); see `asked_about`.

    Args:
        n_envs: How many environments.
        levels: The levels that episodes are drawn from; a level fixes everything in an episode.
        seed: Start of the random level sequences.
        data: "glyphs", "digits", a folder, or two of these, separated by a comma.
        ways: Classes per episode, or a range that it is drawn from: "5:20".
        shots: Examples per class, or a range that it is drawn from for every part: "1:5".
        queries: Images asked for after the examples (of each part), of classes drawn independently.
        labels: "ask", "sync" or "delayed".
        cut: The most examples left out at the end of a part.
        outputs: Size of the label and number of actions; 0: the most ways. An agent trained with 20 outputs can be
            evaluated with 5 ways; the labels of an episode are drawn from all outputs.
        size: Height and width that images are scaled to; 0: as they are.

    Raises:
        UserError: If a setting is out of range, or the data cannot be loaded or has too few classes or images.
    """

    games = ("fewshot",)
    has_answers = True
    memory_inputs: ClassVar[tuple[str, ...]] = ()
    levels_share_content = True

    def __init__(
        self,
        n_envs: int,
        levels: str | LevelRange = "all",
        seed: int = 0,
        data: str = "glyphs",
        ways: int | str = 5,
        shots: int | str = "1:5",
        queries: int = 1,
        labels: str = "ask",
        cut: int = 0,
        outputs: int = 0,
        size: int = 0,
    ) -> None:
        self.protocol = _protocol(ways, shots, queries, labels, cut, outputs)
        names = _names(data)
        self.images, self._data_sets, fingerprint = load_together(names, _check_size(size))
        for name, splits in zip(names, self._data_sets, strict=True):
            _check_data(name, splits, self.protocol)
        space = spaces.Dict(
            image=spaces.Box(0, 255, self.images.shape[1:], np.uint8),
            label=spaces.Box(0.0, 1.0, (self.protocol.outputs,), np.float32),
        )
        super().__init__(n_envs, levels, seed, space, self.protocol.outputs, self.protocol, fingerprint)

    @classmethod
    def score_range(cls, **settings: Any) -> tuple[float, float]:
        """Return the mean returns of a random agent and of one that knows every label, which none can know at first."""
        env = cls(1, **settings)
        return 1.0 / env.protocol.outputs, 1.0

    @classmethod
    def reference_returns(cls, levels: Sequence[int] | IntArray | LevelRange, **settings: Any) -> dict[str, FloatArray]:
        """Return the expected returns of chance, of the labels alone, and of two nearest-neighbour classifiers."""
        env, levels = cls(1, **settings), check_levels(levels)
        episodes = env.episodes(levels)
        answers = env.reference_answers(episodes)
        n_asked = episodes.asked.sum(axis=1)
        return {name: (right.sum(axis=1) / n_asked).astype(np.float32) for name, right in answers.items()}

    @classmethod
    def test_levels(cls, held_out: LevelRange) -> LevelRange:
        """Return the first 1,000 levels of test classes in place of levels of validation classes."""
        is_validation = (splits_of(held_out) == [1]).all()
        return LevelRange(2 * LEVELS_PER_SPLIT, 2 * LEVELS_PER_SPLIT + 1000) if is_validation else held_out

    @classmethod
    def trained_levels(cls, training: LevelRange, levels: IntArray) -> BoolArray:
        """Return which of `levels` `[n]` draw classes that training levels draw, too."""
        return np.isin(split_of(levels), splits_of(training))

    def reference_answers(self, episodes: Episodes) -> dict[str, FloatArray]:
        """Return how likely each reference policy answers right at every step of `episodes`, `[n, T]` each."""
        return reference_answers(episodes, self.images, self.protocol)

    def episodes(self, levels: IntArray) -> Episodes:
        """Return all steps of the episodes of levels `[n]`, `[n, T]` arrays."""
        return draw_episodes(levels, self._data_sets, self.protocol)

    def answers(self) -> IntArray:
        """Return the right action for the current observations, `[n]`; -1 where nothing is asked."""
        return np.where(self._now("asked"), self._now("label"), -1)

    def asked_about(self) -> dict[str, Array]:
        """Return what the current observations ask about, `[n]` per key; see the class."""
        keys = ("asked", "seen", "query", "part", "data_set", "position")
        return {key: self._now(key).copy() for key in keys}

    def step_notes(self) -> dict[str, IntArray]:
        """Return for the current observations, `[n]` each, 1 for true and -1 for none.

        `label` is the image's, `told` the one shown, `own` whether this is the image's own, and `answer` the right
        action; `seen`, `query` and `part` are those of `asked_about`.
        """
        notes = {key: self._now(key).astype(np.int64) for key in ("label", "told", "seen", "query", "part")}
        own = (notes["told"] >= 0) & (notes["query"] == 0) & (self.protocol.labels != "delayed")
        return {**notes, "own": own.astype(np.int64), "answer": self.answers()}

    def _now(self, key: str) -> Array:
        array: Array = getattr(self._episodes, key)[np.arange(self.n_envs), self._clock]
        return array

    def _start(self) -> None:
        self._drawn: dict[int, Episodes] = {}
        empty = self.episodes(np.zeros(self.n_envs, np.int64))
        # One column more than the longest episode: the observation after its end.
        self._episodes = Episodes._make(np.pad(array, ((0, 0), (0, 1)), constant_values=0) for array in empty)
        self._length, self._n_asked = np.zeros((2, self.n_envs), np.int64)
        super()._start()

    def _drawn_episodes(self, levels: IntArray) -> Episodes:
        """Return `episodes(levels)`; drawn together with the levels that follow, since 32 take as long as a few."""
        if not self._drawn.keys() >= set(levels.tolist()):
            random = np.flatnonzero(self._pins < 0)
            following = [self.sampled_levels(random, self._counts[random] + k) for k in range(DRAWN_AHEAD)]
            ahead = np.unique(np.concatenate([levels, *following]))
            episodes = self.episodes(ahead)
            self._drawn = {level: Episodes._make(a[i] for a in episodes) for i, level in enumerate(ahead.tolist())}
        rows = [self._drawn[level] for level in levels.tolist()]
        return Episodes._make(np.stack(arrays) for arrays in zip(*rows, strict=True))

    def _begin_episodes(self, mask: BoolArray) -> None:
        drawn = self._drawn_episodes(self._level[mask])
        for array, rows in zip(self._episodes, drawn, strict=True):
            array[mask, :-1] = rows
        self._episodes.image[:, -1] = -1
        self._length[mask], self._n_asked[mask] = (drawn.image >= 0).sum(axis=1), drawn.asked.sum(axis=1)

    def observe(self) -> dict[str, Array]:
        """Return the images and the labels shown beside them, `[n, ...]` each; after an episode's end, zeros."""
        index, told = self._now("image"), self._now("told")
        images = self.images[index]
        label = (told[:, None] == np.arange(self.protocol.outputs)).astype(np.float32)
        ended = index < 0
        if ended.any():
            images[ended], label[ended] = 0, 0.0
        return {"image": images, "label": label}

    def _act(self, actions: Array) -> Acted:
        self._info = self.asked_about()
        rewards = (actions == self.answers()) / self._n_asked
        return rewards.astype(np.float32), self._clock == self._length - 1, np.zeros(self.n_envs, np.bool_), None

    def _step_info(self) -> dict[str, Array]:
        return self._info


def _bounds(name: str, value: int | str) -> tuple[int, int]:
    """Read a whole number or a range "low:high" of them."""
    if isinstance(value, str):
        low, colon, high = value.partition(":")
        if not (low.isdecimal() and low.isascii() and (not colon or (high.isdecimal() and high.isascii()))):
            raise UserError(f"{name} must be a whole number above 0, or a range such as 1:5, not {value!r}")
        bounds = int(low), int(high or low)
    else:
        bounds = check_count(name, value), value
    if not 1 <= bounds[0] <= bounds[1] <= 1000:
        raise UserError(f"{name} must be 1 to 1000, and a range's second number not below the first, not {value}")
    return bounds


def _protocol(ways: int | str, shots: int | str, queries: int, labels: str, cut: int, outputs: int) -> Protocol:
    if labels not in FORMATS:
        raise UserError(f"there is no label format {labels!r}{did_you_mean(str(labels), FORMATS)}")
    protocol = Protocol(
        _bounds("ways", ways),
        _bounds("shots", shots),
        check_count_or_zero("queries", queries),
        labels,
        check_count_or_zero("cut", cut),
        check_count_or_zero("outputs", outputs),
    )
    if protocol.ways[0] < 2:
        raise UserError("ways must be 2 or more: with one class there is nothing to tell apart")
    if labels == "sync" and not queries:
        raise UserError("labels 'sync' ask for queries alone; queries must be 1 or more")
    if cut >= protocol.ways[0] * protocol.shots[0]:
        raise UserError(
            f"cut {cut} could leave no example of the {protocol.ways[0] * protocol.shots[0]} (ways x shots) of a part; "
            "use a smaller cut or more shots"
        )
    if outputs and outputs < protocol.ways[1]:
        raise UserError(f"outputs {outputs} are fewer than the {protocol.ways[1]} ways; use at least as many, or 0")
    return protocol._replace(outputs=protocol.outputs or protocol.ways[1])


def _names(data: str) -> list[str]:
    names = [name.strip() for name in data.split(",")] if isinstance(data, str) else []
    if len(names) not in (1, 2) or not all(names):
        raise UserError(f"data must be glyphs, digits, a folder, or two of these separated by a comma, not {data!r}")
    return names


def _check_size(size: int) -> int:
    if check_count_or_zero("size", size) and not 8 <= size <= 256:
        raise UserError(f"size must be 8 to 256, or 0 for the images' own, not {size}")
    return size


def _check_data(name: str, splits: Sequence[Any], protocol: Protocol) -> None:
    ways, images = protocol.ways[1], protocol.shots[1] + protocol.queries
    for split, classes in zip(SPLITS, splits, strict=True):
        if len(classes.starts) < ways:
            raise UserError(f"{name} has {len(classes.starts)} {split} classes; use at most as many ways, not {ways}")
        if classes.counts.min() < images:
            raise UserError(
                f"{name} has a {split} class of {classes.counts.min()} images, fewer than shots + queries ({images}); "
                "use fewer shots or queries, or remove the class"
            )
