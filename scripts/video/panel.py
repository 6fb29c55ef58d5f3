"""What the panel beside the game shows: a trace's arrays as sections of a chart."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from srwm_rl.scripts.video.chart import Chart, Curve, Heat, Section, number
from srwm_rl.scripts.video.colours import GREEN, ORANGE, Colour

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

# procgen/env.py, BaseProcgenEnv.get_combos: nine directions, then six keys whose meaning depends on the game.
PROCGEN_ACTIONS = (
    "left-down", "left", "left-up", "down", "no-op", "up", "right-down", "right", "right-up",
    "D", "A", "W", "S", "Q", "E",
)  # fmt: skip
RATE_LABELS = ("y", "q", "k", "beta")


def panel(size: tuple[int, int], arrays: Arrays, space: spaces.Space[Any], names: list[str]) -> Chart:
    """Return the panel of a recording of T steps; `names` are those of the policy's columns."""
    sections = [
        *_changes(arrays),
        *_rates(arrays),
        _policy(arrays, space, names),
        _line("value", arrays["values"], *_bounds(arrays["values"]), GREEN),
        _entropy(arrays, space),
        _returns(arrays),
    ]
    return Chart(size, sections, arrays["starts"])


def choice_names(space: spaces.Space[Any], is_procgen: bool) -> list[str]:
    """Name the policy's columns `[N]`: actions, or the numbers of a Box action."""
    if isinstance(space, spaces.Discrete):
        return list(PROCGEN_ACTIONS) if is_procgen else [str(i) for i in range(int(space.n))]
    if isinstance(space, spaces.MultiDiscrete):
        return [f"{part}:{i}" for part, n in enumerate(space.nvec.ravel().tolist()) for i in range(n)]
    return [str(i) for i in range(int(np.prod(space.shape or (1,))))]


def chosen(arrays: Arrays, space: spaces.Space[Any]) -> Array:
    """Return which of the policy's columns each action took, `[T, N]` bool; none for Box."""
    n_steps, n_columns = arrays["choices"].shape
    actions = arrays["actions"].reshape(n_steps, -1)
    marks = np.zeros((n_steps, n_columns), np.bool_)
    if isinstance(space, spaces.MultiBinary):
        return actions.astype(np.bool_)
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        sizes = space.nvec.ravel() if isinstance(space, spaces.MultiDiscrete) else np.array([space.n])
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        np.put_along_axis(marks, actions + offsets, True, axis=1)
    return marks


def _changes(arrays: Arrays) -> list[Section]:
    if not arrays["edit"].size:  # a core without memory
        return []
    n_layers, n_heads = arrays["edit"].shape[1:]
    what = "W" if "rates" in arrays else "state"
    per = "per layer.head" if n_heads > 1 else "per layer"
    if "rates" in arrays:
        titles = (
            f"edit  |W(t+1) - W(t)|, Frobenius norm, {per}",
            f"drift  |W(t) - W(0)|, Frobenius norm, {per}",
        )
    else:
        titles = f"change of the {what}, Euclidean norm, {per}", f"{what}, Euclidean norm, {per}"
    labels = [f"{layer}.{head}" if n_heads > 1 else str(layer) for layer in range(n_layers) for head in range(n_heads)]
    sections = []
    for name, title, colours in (("edit", titles[0], "ember"), ("drift", titles[1], "sea")):
        values = arrays[name].reshape(len(arrays[name]), -1)
        high = float(values.max()) or 1.0
        height = min(max(14.0 * len(labels), 24.0), 70.0)
        heat = Heat(values, 0.0, high, colours, labels, height, range(n_heads, len(labels), n_heads))
        sections.append(Section(title, [heat], _mean(values)))
    return sections


def _mean(values: Array) -> Callable[[int], str]:
    return lambda t: f"mean {number(float(values[t].mean()))}"


def _rates(arrays: Arrays) -> list[Section]:
    if "rates" not in arrays:
        return []
    n_steps, n_layers, n_heads, _ = arrays["rates"].shape
    rates = arrays["rates"].reshape(n_steps, -1, len(RATE_LABELS))
    height = min(8.0 * rates.shape[1], 24.0)
    bands = range(n_heads, n_layers * n_heads, n_heads)
    plots = [Heat(rates[..., i], 0.0, 1.0, "poles", [label], height, bands) for i, label in enumerate(RATE_LABELS)]

    def now(t: int) -> str:
        means = rates[t].mean(0)
        return "mean  " + "   ".join(f"{label} {mean:.2f}" for label, mean in zip(RATE_LABELS, means, strict=True))

    return [Section("self-chosen learning rates, rows as above", plots, now)]


def _policy(arrays: Arrays, space: spaces.Space[Any], names: list[str]) -> Section:
    choices = arrays["choices"]
    height = min(max(16.0 * len(names), 32.0), 120.0)
    if isinstance(space, spaces.Box):
        reach = float(np.abs(choices).max()) or 1.0
        heat = Heat(choices, -reach, reach, "poles", names, height)
        return Section("policy: mean of each number of the action", [heat])
    marks = chosen(arrays, space)
    heat = Heat(choices, 0.0, highest(choices), "grey", names, height, marks=marks)
    title = "policy: probability of each action" if not isinstance(space, spaces.MultiBinary) else "policy: P(bit = 1)"
    return Section(title, [heat])


def highest(choices: Array) -> float:
    """Return where the scale of probabilities ends: at the highest of `[T, N]`, but even ones shall look even."""
    return min(1.0, max(float(choices.max()), 2 / choices.shape[1]))


def _line(title: str, values: Array, low: float, high: float, colour: Colour) -> Section:
    return Section(title, [Curve(values, low, high, colour, 30.0)], lambda t: number(float(values[t])))


def _bounds(values: Array) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high - low > 1e-6 * max(abs(low), abs(high), 1e-30) else (low - 0.5, high + 0.5)


def _entropy(arrays: Arrays, space: spaces.Space[Any]) -> Section:
    values = arrays["entropy"]
    if isinstance(space, spaces.Box):  # differential entropy has no natural bounds
        return _line("entropy of the policy, nats", values, *_bounds(values), ORANGE)
    most = arrays["choices"].shape[1]
    if isinstance(space, spaces.MultiDiscrete):
        high = float(np.log(space.nvec).sum())
    else:
        high = log(most) if isinstance(space, spaces.Discrete) else most * log(2)
    return _line("entropy of the policy, nats", values, 0.0, high or 1.0, ORANGE)


def _returns(arrays: Arrays) -> Section:
    rewards, returns = arrays["rewards"].astype(np.float64), running_returns(arrays)
    both = np.concatenate([rewards, returns])
    low, high = min(0.0, float(both.min())), max(0.0, float(both.max()))
    curve = Curve(returns, low, high if high > low else 1.0, ORANGE, 45.0, bars=rewards)
    return Section(
        "reward (bars) and return (line)",
        [curve],
        lambda t: f"reward {number(float(rewards[t]))}   return {number(float(returns[t]))}",
    )


def running_returns(arrays: Arrays) -> Array:
    """Return the sum of each episode's rewards up to and with each step, `[T]`."""
    total, returns = 0.0, np.zeros(len(arrays["rewards"]))
    for t, (reward, start) in enumerate(zip(arrays["rewards"].tolist(), arrays["starts"].tolist(), strict=True)):
        total = reward + (0.0 if start else total)
        returns[t] = total
    return returns
