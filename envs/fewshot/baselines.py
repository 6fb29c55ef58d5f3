"""Answers without learning: what chance, the labels alone and comparing pixels achieve in few-shot episodes."""

from __future__ import annotations

import numpy as np

from srwm_rl.envs.batch import Array, FloatArray
from srwm_rl.envs.fewshot.episodes import Episodes, Protocol
from srwm_rl.envs.images.image_set import ImageArray
from srwm_rl.envs.levels import BoolArray


def reference_answers(episodes: Episodes, images: ImageArray, protocol: Protocol) -> dict[str, FloatArray]:
    """Return how likely each reference policy answers right, `[n, T]` each; 0 where nothing is asked.

    - "chance": one of the outputs at random.
    - "labels alone": the label told least often so far, without looking at images; the best possible for classes
      of which no example has been seen.
    - "nearest pixels": the label of the example at the smallest Euclidean distance.
    - "blurred cosine": the label of the example with the largest cosine, after a blur.

    Before the first label is told, a policy answers at random.

    Args:
        episodes: The steps, `[n, T]`.
        images: `[M, height, width, channels]`, that the steps index.
        protocol: How the episodes were put together.
    """
    chance = episodes.asked / np.float32(protocol.outputs)
    pixels, cosine, alone = (np.zeros_like(chance) for _ in range(3))
    for i in range(len(chance)):
        n_steps = int((episodes.image[i] >= 0).sum())
        image, label, asked = (array[i, :n_steps] for array in (episodes.image, episodes.label, episodes.asked))
        known = _known(episodes, i, n_steps, protocol.labels)
        shown = images[image]
        pixels[i, :n_steps] = _nearest(_closeness(shown), known, label, protocol.outputs) * asked
        cosine[i, :n_steps] = _nearest(_cosines(_blur(shown)), known, label, protocol.outputs) * asked
        alone[i, :n_steps] = _least_told(known, label, protocol.outputs) * asked
    return {"chance": chance, "labels alone": alone, "nearest pixels": pixels, "blurred cosine": cosine}


def _known(episodes: Episodes, i: int, n_steps: int, labels: str) -> BoolArray:
    """Return whether the label of the image at step `s` is known at step `t`, `[t, s]`."""
    told = np.ones(n_steps, np.bool_) if labels == "delayed" else ~episodes.asked[i, :n_steps]
    known: BoolArray = np.tril(np.ones((n_steps, n_steps), np.bool_), -1) & told
    return known


def _nearest(closeness: Array, known: BoolArray, label: Array, outputs: int) -> Array:
    best = np.where(known, closeness, -np.inf).argmax(axis=1)
    return np.where(known.any(axis=1), label[best] == label, 1 / outputs)


def _closeness(images: ImageArray) -> Array:
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    squares = np.square(flat).sum(axis=1)
    closeness: Array = 2 * flat @ flat.T - squares - squares[:, None]
    return closeness


def _cosines(images: Array) -> Array:
    flat = images.reshape(len(images), -1)
    flat = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)
    cosines: Array = flat @ flat.T
    return cosines


def _blur(images: ImageArray) -> Array:
    """Blur `[n, height, width, channels]` by a Gaussian with a deviation of 1/14 of the width."""
    blurred: Array = images.astype(np.float32)
    for axis in (1, 2):
        deviation = images.shape[axis] / 14
        places = np.arange(images.shape[axis])
        weights = np.exp(-0.5 * ((places - places[:, None]) / deviation) ** 2).astype(np.float32)
        blurred = np.moveaxis(np.tensordot(blurred, weights, axes=(axis, 0)), -1, axis)
    return blurred


def _least_told(known: BoolArray, label: Array, outputs: int) -> Array:
    counts = known @ np.eye(outputs)[label]  # [t, outputs]
    least = counts == counts.min(axis=1, keepdims=True)
    shares: Array = least[np.arange(len(label)), label] / least.sum(axis=1)
    return shares
