"""Few-shot classification as a task: see examples of new classes with their labels, then name new images' labels."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from srwm_rl.envs.batch import Acted, Array, FloatArray, check_count
from srwm_rl.envs.images.sources import SPLITS, ImageClasses, image_classes
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange, hash_integers, hash_uniform
from srwm_rl.envs.tasks.base import TaskBatch
from srwm_rl.errors import UserError

LABELS = ("ask", "sync", "delayed")
LEVELS_PER_SPLIT = 1_000_000
CLASSES, LABEL_ORDER, IMAGES, ORDER, SHOTS, QUERIES, SOURCE_ORDER, CUT = range(1, 9)  # second keys of the hashes


class FewShotBatch(TaskBatch):
    """Name the labels of images of classes that a level draws, from a few examples shown in the same episode.

    A level draws `ways` classes, gives each a label in 0 .. `ways` - 1, and shows `shots` examples of each in random
    order, then `queries` further images of these classes. Nothing but the memory can connect a class with its label.

    `labels` says when labels are told (Irie et al., 2022, section 4.1, for sync and delayed):

    - "ask": every example twice, first alone, and the answer is asked for, then with its label; queries alone.
    - "sync": every example once, with its label; only queries are asked for, with the dummy label 0.
    - "delayed": every example once, with the label of the one before (label 0 at the first); every step is asked for.

    With two sources an episode has two parts, one of each source, in random order and with the same labels: sequential
    adaptation. Reward 1 / (number of steps that ask) for a right answer, so that the return is the accuracy.

    **Levels choose the split**: 0 .. 999,999 draw classes of the training split, the next million of the validation
    split, all others of the test split; so the classes of an evaluation on levels from 2,000,000 on were never trained on.

    Observations: Dict of `image` uint8 `[n, height, width, channels]` and `label` float32 `[n, label_size]`, one-hot,
    zeros where no label is told. Actions: one of `label_size` labels.

    The info of an episode's last step has `trial_returns` `[n, parts * (shots + 1)]`: accuracy by examples of the
    asked class already seen, by part; NaN where nothing was asked.

    Args:
        n_envs: How many environments.
        levels: The levels that episodes are drawn from; a level fixes everything that is shown.
        seed: Start of the random level sequences.
        data: Sources of images with commas, one or two: "glyphs", "digits" or a folder.
        ways: Classes per episode, 2 or more.
        shots: Examples per class, or a range such as "1:5" (both included) from which each level draws a number.
        queries: Images at the end of a part.
        labels: "ask", "sync" or "delayed".
        label_size: Length of labels and number of actions; None: `ways`. An agent keeps the one of its training.
        cut: Leave out up to so many of the last examples of each part (drawn evenly per level and part).

    Raises:
        UserError: If a setting is out of range or the images do not suffice.
    """

    games = ("few_shot",)
    has_answers = True
    memory_inputs: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        n_envs: int,
        levels: str | LevelRange = f"0:{LEVELS_PER_SPLIT}",
        seed: int = 0,
        data: str = "glyphs",
        ways: int = 5,
        shots: int | str = 1,
        queries: int = 5,
        labels: str = "ask",
        label_size: int | None = None,
        cut: int = 0,
    ) -> None:
        self.ways, self.queries = check_count("ways", ways), check_count("queries", queries)
        self.shots_low, self.shots_high = _shots(shots)
        self.label_size = self.ways if label_size is None else check_count("label_size", label_size)
        self.cut = cut and check_count("cut", cut)
        if self.ways < 2 or self.label_size < self.ways:
            raise UserError(f"ways must be 2 or more and at most label_size ({self.label_size}), not {ways}")
        if labels not in LABELS:
            raise UserError(f"labels must be one of {', '.join(LABELS)}, not {labels!r}")
        self.labels, self.data = labels, str(data)
        self.sources = [image_classes(name) for name in self.data.split(",")]
        if len(self.sources) > 2:
            raise UserError("data names one source of images, or two for sequential adaptation")
        self._check_images()
        repeats = 2 if labels == "ask" else 1
        self.part_length = repeats * self.ways * self.shots_high + self.queries
        self.length = len(self.sources) * self.part_length  # at most
        space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, self._sets(0)[0].images.shape[1:], np.uint8),
                "label": spaces.Box(0.0, 1.0, (self.label_size,), np.float32),
            }
        )
        numbers = self.ways, self.shots_low, self.shots_high, self.queries, LABELS.index(labels), self.cut
        super().__init__(n_envs, levels, seed, space, self.label_size, *numbers, self.data)

    @classmethod
    def score_range(cls, **settings: Any) -> tuple[float, float]:
        """Return the mean returns of a random and of the best possible agent."""
        return 1.0 / (settings.get("label_size") or settings.get("ways", 5)), 1.0

    def _sets(self, split: int) -> list[ImageClasses]:
        return [source[SPLITS[split]] for source in self.sources]

    def _check_images(self) -> None:
        wanted = self.shots_high + self.queries
        shapes = {of.images.shape[1:] for source in self.sources for of in source.values()}
        if len(shapes) > 1:
            raise UserError(f"the images must have one size; these have {sorted(shapes)}")
        for name, source in zip(self.data.split(","), self.sources, strict=True):
            for split, of in source.items():
                if len(of.count) < self.ways or int(of.count.min()) < wanted:
                    raise UserError(
                        f"{name}'s {split} split has {len(of.count)} classes of {of.count.min()} images or more; "
                        f"{self.ways} ways, {self.shots_high} shots and {self.queries} queries need {self.ways} "
                        f"classes of {wanted}: give fewer"
                    )

    def _start(self) -> None:
        shape = self.n_envs, self.length + 1  # the last column is shown after the end
        self._image = np.zeros(shape, np.int64)  # index among the images of the part's source and the level's split
        self._part, self._told, self._answer, self._seen = np.zeros((4, *shape), np.int64)
        self._end = np.zeros(self.n_envs, np.int64)
        self._split = np.zeros(self.n_envs, np.int64)
        self._asked = np.zeros((self.n_envs, len(self.sources) * (self.shots_high + 1)), np.int64)
        self._right = np.zeros_like(self._asked)
        super()._start()

    def _begin_episodes(self, mask: BoolArray) -> None:
        rows = np.flatnonzero(mask)
        level = self._level[rows]
        self._split[rows] = np.minimum(level // LEVELS_PER_SPLIT, len(SPLITS) - 1)
        second_first = (hash_integers(level, SOURCE_ORDER) % np.uint64(2)).astype(np.int64)
        columns: list[Array] = []  # of the parts in the order that they are shown
        for position in range(len(self.sources)):
            source = (position + second_first) % 2 if len(self.sources) == 2 else np.zeros_like(level)
            columns.append(self._part_columns(level, self._split[rows], source, position))
        shown = np.concatenate(columns, axis=2)  # [6, n, length]: of these some are left out
        order = np.argsort(~shown[5].astype(bool), axis=1, kind="stable")
        shown = np.take_along_axis(shown, order[None], axis=2)
        self._end[rows] = shown[5].sum(axis=1)
        for array, values in zip(
            (self._image, self._part, self._told, self._answer, self._seen), shown[:5], strict=True
        ):
            array[rows, : self.length] = values
        self._told[rows, self._end[rows]], self._image[rows, self._end[rows]] = -1, -1
        self._asked[rows] = self._right[rows] = 0

    def _part_columns(self, level: IntArray, split: IntArray, source: IntArray, position: int) -> Array:
        """Return what a part shows, `[6, n, part_length]`: image, source, told, answer, examples seen, whether shown."""
        ways, n, high = self.ways, len(level), self.shots_high
        n_classes = np.array([[len(of.count) for of in self._sets(s)] for s in range(len(SPLITS))])[split, source]
        classes = _distinct(ways, n_classes, level, CLASSES, position)  # [n, ways], by label
        shots = self.shots_low + _below(high - self.shots_low + 1, level, SHOTS, position)  # [n]
        example = np.tile(np.arange(ways), high)  # labels of the examples before they are shuffled
        valid = np.arange(high).repeat(ways)[None] < shots[:, None]  # [n, ways * high]
        luck = hash_uniform(level[:, None], ORDER, position, np.arange(ways * high)) + ~valid
        label = example[np.argsort(luck, axis=1)]  # [n, ways * high]
        valid = np.sort(luck, axis=1) < 1
        if self.cut:
            left = shots * ways - np.minimum(_below(self.cut + 1, level, CUT, position), shots * ways - 1)
            valid &= np.arange(ways * high) < left[:, None]
        query = _below(ways, level[:, None], QUERIES, position, np.arange(self.queries))  # [n, queries]
        label = np.concatenate((label, query), axis=1)
        seen = (label[:, None, :] == label[:, :, None]) & np.tri(label.shape[1], k=-1, dtype=bool)
        number = seen.sum(axis=2)  # how many images of the class were shown before
        of_examples = (seen & np.pad(valid, ((0, 0), (0, self.queries)))[:, None, :]).sum(axis=2)
        image = self._pick(level, split, source, position, np.take_along_axis(classes, label, axis=1), number)
        valid = np.pad(valid, ((0, 0), (0, self.queries)), constant_values=True)
        return self._format(np.stack((image, np.broadcast_to(source[:, None], image.shape), label, of_examples, valid)))

    def _pick(
        self, level: IntArray, split: IntArray, source: IntArray, position: int, classes: IntArray, number: IntArray
    ) -> IntArray:
        """Return the index of the `number`-th image of a class in the level's random order, `[n, k]`."""
        picked = np.zeros_like(classes)
        for s, t in {*zip(split.tolist(), source.tolist(), strict=True)}:
            rows, of = np.flatnonzero((split == s) & (source == t)), self._sets(s)[t]
            largest = int(of.count.max())
            luck = hash_uniform(level[rows, None, None], IMAGES, position, classes[rows, :, None], np.arange(largest))
            luck[np.arange(largest) >= of.count[classes[rows], None]] = 2.0
            image = np.take_along_axis(np.argsort(luck, axis=2), number[rows, :, None], axis=2)[..., 0]
            picked[rows] = of.first[classes[rows]] + image
        return picked

    def _format(self, columns: Array) -> Array:
        """Return `[6, n, part_length]` of image, source, told, answer, seen, whether shown."""
        image, source, label, seen, valid = columns
        nothing, k = np.full_like(label, -1), self.ways * self.shots_high
        if self.labels == "ask":
            twice = [*np.arange(k).repeat(2), *range(k, k + self.queries)]
            told, answer = np.full((2, len(label), len(twice)), -1)
            told[:, 1 : 2 * k : 2], answer[:, 0 : 2 * k : 2] = label[:, :k], label[:, :k]
            answer[:, 2 * k :] = label[:, k:]
            shown = np.stack((image, source, label, seen, valid))[:, :, twice]
            return np.stack((shown[0], shown[1], told, answer, shown[3], shown[4]))
        told, answer = label.copy(), label.copy()
        if self.labels == "sync":
            told[:, k:], answer[:, :k] = 0, nothing[:, :k]
        else:
            last = np.maximum.accumulate(np.where(valid, np.arange(label.shape[1]), 0), axis=1)  # the last one shown
            told[:, 1:] = np.take_along_axis(label, last[:, :-1], axis=1)
            told[:, 0] = 0
        return np.stack((image, source, told, answer, seen, valid))

    def observe(self) -> dict[str, Array]:
        """Return the present images and labels; black and zeros after the last."""
        now = np.arange(self.n_envs), self._clock
        image, source, told = self._image[now], self._part[now], self._told[now]
        images = np.zeros((self.n_envs, *self.observation_space["image"].shape), np.uint8)  # type: ignore[index]
        for s, t in {*zip(self._split.tolist(), source.tolist(), strict=True)}:
            rows = np.flatnonzero((self._split == s) & (source == t) & (image >= 0))
            images[rows] = self._sets(s)[t].images[image[rows]]
        label = np.zeros((self.n_envs, self.label_size), np.float32)
        rows = np.flatnonzero(told >= 0)
        label[rows, told[rows]] = 1.0
        return {"image": images, "label": label}

    def answers(self) -> IntArray:
        """Return the labels that are asked for, `[n]`, -1 where none is."""
        return self._answer[np.arange(self.n_envs), self._clock]

    def _act(self, actions: Array) -> Acted:
        rows, answer = np.arange(self.n_envs), self.answers()
        right, asked = answer == actions, answer >= 0
        part = self._position()
        column = part * (self.shots_high + 1) + self._seen[rows, self._clock]
        self._asked[rows, column] += asked
        self._right[rows, column] += right
        done = self._clock == self._end - 1
        rewards = (right / self._n_asked()).astype(np.float32)
        return rewards, done, np.zeros(self.n_envs, np.bool_), None

    def _position(self) -> IntArray:
        """Return which part of the episode is being shown, `[n]`."""
        rows = np.arange(self.n_envs)
        changed: IntArray = self._part[rows, self._clock] != self._part[rows, 0]
        return changed.astype(np.int64)

    def _n_asked(self) -> IntArray:
        before_end = np.arange(self.length + 1) < self._end[:, None]
        return ((self._answer >= 0) & before_end).sum(axis=1)

    def _step_info(self) -> dict[str, Array]:
        with np.errstate(invalid="ignore"):
            return {"trial_returns": (self._right / self._asked).astype(np.float32)}

    def _arrays(self) -> dict[str, Array]:
        return {**super()._arrays(), "asked": self._asked, "right": self._right}


def _shots(shots: int | str) -> tuple[int, int]:
    low, colon, high = str(shots).partition(":")
    if not low.isdecimal() or (colon and not high.isdecimal()):
        raise UserError(f"shots must be a number or a range such as 1:5, not {shots!r}")
    bounds = int(low), int(high or low)
    if not 1 <= bounds[0] <= bounds[1]:
        raise UserError(f"shots must be 1 or more, the lower one first, not {shots!r}")
    return bounds


def _below(n: int, *keys: int | IntArray) -> IntArray:
    """Hash the broadcast `keys` to whole numbers in 0 .. n - 1."""
    return (hash_integers(*keys) % np.uint64(n)).astype(np.int64)


def _distinct(k: int, n: IntArray, level: IntArray, *keys: int) -> IntArray:
    """Draw k distinct numbers below `n` `[rows]` in random order, `[rows, k]`: Fisher and Yates's shuffle, sparsely."""
    chosen = np.zeros((len(level), k), np.int64)
    for i in range(k):
        # The i-th of those numbers that are left: counted over the chosen ones, which are sorted.
        drawn = (hash_integers(level, *keys, i) % (n - i).astype(np.uint64)).astype(np.int64)
        for taken in np.sort(chosen[:, :i], axis=1).T:
            drawn += drawn >= taken
        chosen[:, i] = drawn
    return chosen
