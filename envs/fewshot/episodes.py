"""What few-shot episodes contain, as a function of their levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from srwm_rl.envs.batch import Array
from srwm_rl.envs.images.image_set import Classes
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange, hash_integers

LEVELS_PER_SPLIT = 1_000_000
"""Levels 0 .. 999,999 draw training classes, the next as many validation classes, the next test classes."""

WAYS, ORDER, LABELS, SHOTS, CUT, CLASSES, IMAGES, SHUFFLE, QUERIES = range(9)  # second keys of the hashes
_LARGEST = np.uint64(2**64 - 1)


class Protocol(NamedTuple):
    """How episodes are put together; see `srwm_rl.envs.tasks.fewshot.FewShotBatch` for the entries."""

    ways: tuple[int, int]
    shots: tuple[int, int]
    queries: int
    labels: str
    cut: int
    outputs: int


class Episodes(NamedTuple):
    """The steps of episodes, `[n, T]` each; an episode shorter than T is followed by padding."""

    image: IntArray
    """Index of the image; -1 in padding."""
    label: IntArray
    """Label of the image, known to the agent or not."""
    told: IntArray
    """The label that the observation shows; -1: none."""
    asked: BoolArray
    """Whether the agent's action is its answer."""
    query: BoolArray
    """Whether the image is a query, of which no label follows."""
    seen: IntArray
    """Examples of the image's class before this one."""
    part: IntArray
    """Which part of the episode the image belongs to: 0, or 1 for the second data set."""
    data_set: IntArray
    """Index of the part's data set."""
    position: IntArray
    """Index of the example within its part, or of the query among the part's queries."""


def split_of(levels: IntArray) -> IntArray:
    """Return the index of the split that each level draws from; levels from 3,000,000 on draw training classes."""
    split = levels // LEVELS_PER_SPLIT
    return np.where(split < 3, split, 0)


def splits_of(levels: LevelRange) -> IntArray:
    """Return the indices of the splits that the levels of a range draw from."""
    borders = np.arange(1, 4) * LEVELS_PER_SPLIT
    inside = borders[(borders > levels.start) & (borders < levels.stop)]
    return np.unique(split_of(np.array([levels.start, *inside])))


def draw_episodes(levels: IntArray, data_sets: Sequence[tuple[Classes, ...]], protocol: Protocol) -> Episodes:
    """Return the episodes of levels `[n]`; T is the protocol's longest episode."""
    n_parts = len(data_sets)
    order = hash_integers(levels[:, None], ORDER, np.arange(n_parts)).argsort(axis=1)  # [n, P]
    ways = _between(protocol.ways, hash_integers(levels, WAYS))
    outputs = hash_integers(levels[:, None], LABELS, np.arange(protocol.outputs)).argsort(axis=1)[:, : protocol.ways[1]]
    parts = [_draw_part(levels, part, order[:, part], ways, outputs, data_sets, protocol) for part in range(n_parts)]
    examples, queries = zip(*parts, strict=True)
    return _with_labels([*examples, *queries], protocol.labels)


def _between(bounds: tuple[int, int], keys: Array) -> IntArray:
    low, high = bounds
    return low + (keys % np.uint64(high - low + 1)).astype(np.int64)


def _draw_part(
    levels: IntArray,
    part: int,
    data_set: IntArray,
    ways: IntArray,
    outputs: IntArray,
    data_sets: Sequence[tuple[Classes, ...]],
    protocol: Protocol,
) -> tuple[Episodes, Episodes]:
    """Return the examples and the queries of one part, `[n, L]` and `[n, queries]`; `told` and `asked` are not set."""
    most_ways, most_shots = protocol.ways[1], protocol.shots[1]
    shots = _between(protocol.shots, hash_integers(levels, SHOTS, part))
    images = _draw_images(levels, part, data_set, data_sets, most_ways, most_shots + protocol.queries)  # [n, N, K + Q]

    slots = np.arange(most_ways * most_shots)
    way, shot = slots % most_ways, slots // most_ways
    keys = hash_integers(levels[:, None], SHUFFLE, part, slots)
    keys[(way >= ways[:, None]) | (shot >= shots[:, None])] = _LARGEST
    order = keys.argsort(axis=1, kind="stable")
    way, shot = way[order], shot[order]  # [n, L]
    n_examples = ways * shots - _between((0, protocol.cut), hash_integers(levels, CUT, part))
    valid = slots < np.maximum(n_examples, 1)[:, None]
    counts = np.cumsum((way[:, :, None] == np.arange(most_ways)) & valid[:, :, None], axis=1)  # [n, L, N]
    seen = np.take_along_axis(counts, way[:, :, None], axis=2)[:, :, 0] - 1

    rows, q = np.arange(len(levels))[:, None], np.arange(protocol.queries)
    asked_way = (hash_integers(levels[:, None], QUERIES, part, q) % ways[:, None].astype(np.uint64)).astype(np.int64)

    def steps(image: IntArray, way: IntArray, seen: IntArray, query: bool) -> Episodes:
        like = np.zeros_like(image)
        position = like + np.arange(image.shape[1])
        told, asked = like - 1, like.astype(np.bool_)
        label = outputs[rows, way]
        return Episodes(image, label, told, asked, asked | query, seen, like + part, like + data_set[:, None], position)

    examples = steps(np.where(valid, images[rows, way, shot], -1), way, seen, False)
    queries = steps(images[rows, asked_way, most_shots + q], asked_way, counts[rows, -1, asked_way], True)
    return examples, queries


def _draw_images(
    levels: IntArray, part: int, data_set: IntArray, data_sets: Sequence[tuple[Classes, ...]], ways: int, n_images: int
) -> IntArray:
    """Draw different classes, and of each different images; return the images' indices, `[n, ways, n_images]`."""
    result = np.zeros((len(levels), ways, n_images), np.int64)
    split = split_of(levels)
    for s in np.unique(split):
        for d in np.unique(data_set):
            rows, classes = np.flatnonzero((split == s) & (data_set == d)), data_sets[d][s]
            if not len(rows):
                continue
            keys = hash_integers(levels[rows, None], CLASSES, part, np.arange(ways))
            chosen = draw_distinct(keys, np.full(len(rows), len(classes.starts)))  # [r, N]
            places = np.arange(ways)[:, None], np.arange(n_images)
            keys = hash_integers(levels[rows, None, None], IMAGES, part, *places)
            drawn = draw_distinct(keys, classes.counts[chosen])  # [r, N, n_images]
            result[rows] = classes.starts[chosen][:, :, None] + drawn
    return result


def draw_distinct(keys: Array, n: IntArray) -> IntArray:
    """Draw `k` different numbers below `n` `[...]` from random integers `[..., k]`, in random order."""
    k = keys.shape[-1]
    drawn = np.zeros(keys.shape, np.int64)
    for i in range(k):
        # A number of those that are left; each earlier one at or below it moves it up by one.
        number = (keys[..., i] % (n - i).astype(np.uint64)).astype(np.int64)
        earlier = np.sort(drawn[..., :i], axis=-1)
        for j in range(i):
            number += number >= earlier[..., j]
        drawn[..., i] = number
    return drawn


def _with_labels(blocks: Sequence[Episodes], labels: str) -> Episodes:
    """Join blocks of steps, set what is told and asked in a label format, and move the padding to the end."""
    steps = Episodes._make(np.concatenate(arrays, axis=1) for arrays in zip(*blocks, strict=True))
    if labels == "ask":  # each example twice: asked, then told
        steps = Episodes._make(array.repeat(2, axis=1) for array in steps)
        again = np.arange(steps.image.shape[1]) % 2 == 1
        steps.image[again & steps.query] = -1
        steps = steps._replace(told=np.where(again, steps.label, -1), asked=np.broadcast_to(~again, steps.query.shape))
    elif labels == "sync":  # the official code has no null label: a query comes with label 0
        steps = steps._replace(told=np.where(steps.query, 0, steps.label), asked=steps.query)
    order = (steps.image < 0).argsort(axis=1, kind="stable")
    steps = Episodes._make(np.take_along_axis(array, order, axis=1) for array in steps)
    if labels == "delayed":  # the label of the image before, 0 at the first
        told = np.concatenate((np.zeros_like(steps.label[:, :1]), steps.label[:, :-1]), axis=1)
        steps = steps._replace(told=told, asked=np.ones_like(steps.asked))
    return steps._replace(asked=steps.asked & (steps.image >= 0))
