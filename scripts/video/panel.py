"""The panel beside the game: a recording's arrays as sections of a chart."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from srwm_rl.scripts.video.chart import Chart, Curve, Heat, Section, format_number
from srwm_rl.scripts.video.colours import GREEN, ORANGE, Colour

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

# procgen/env.py, BaseProcgenEnv.get_combos: nine directions, then six keys whose meaning depends on the game.
PROCGEN_ACTIONS = "↙←↖↓·↑↘→↗DAWSQE"
RATE_LABELS = ("y", "q", "k", "beta")


def make_panel(size: tuple[int, int], arrays: Arrays, space: spaces.Space[Any], names: list[str]) -> Chart:
    """Return the panel of a recording; `names` are those of the policy's columns."""
    sections = [
        *_changes(arrays),
        *_rates(arrays),
        _policy(arrays, space, names),
        _line("value", arrays["values"], *_limits(arrays["values"]), GREEN),
        _entropy(arrays, space),
        _returns(arrays),
    ]
    return Chart(size, sections, arrays["starts"])


def column_names(space: spaces.Space[Any], is_procgen: bool) -> list[str]:
    """Name the N columns of the policy's output: one per action, or per dimension of a Box action."""
    if isinstance(space, spaces.Discrete):
        return list(PROCGEN_ACTIONS) if is_procgen else [str(i) for i in range(int(space.n))]
    if isinstance(space, spaces.MultiDiscrete):
        return [f"{part}:{i}" for part, n in enumerate(space.nvec.ravel().tolist()) for i in range(n)]
    return [str(i) for i in range(int(np.prod(space.shape or (1,))))]


def taken_columns(arrays: Arrays, space: spaces.Space[Any]) -> Array:
    """Return which of the policy's columns each action consists of, `[T, N]` bool; none for Box actions."""
    n_steps, n_columns = arrays["choices"].shape
    actions = arrays["actions"].reshape(n_steps, -1)
    if isinstance(space, spaces.MultiBinary):
        return actions.astype(np.bool_)
    taken = np.zeros((n_steps, n_columns), np.bool_)
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        sizes = space.nvec.ravel() if isinstance(space, spaces.MultiDiscrete) else np.array([space.n])
        np.put_along_axis(taken, actions + np.cumsum(sizes) - sizes, True, axis=1)
    return taken


def _changes(arrays: Arrays) -> list[Section]:
    if not arrays["edit"].size:  # a core without memory
        return []
    n_layers, n_heads = arrays["edit"].shape[1:]
    per = "per layer.head" if n_heads > 1 else "per layer"
    if "rates" in arrays:
        titles = [f"edit  |W(t+1) - W(t)|, Frobenius norm, {per}", f"drift  |W(t) - W(0)|, Frobenius norm, {per}"]
    else:
        titles = [f"change of the state, Euclidean norm, {per}", f"state, Euclidean norm, {per}"]
    labels = [f"{layer}.{head}" if n_heads > 1 else str(layer) for layer in range(n_layers) for head in range(n_heads)]
    height = min(max(14.0 * len(labels), 24.0), 70.0)
    sections = []
    for name, title, colours in zip(("edit", "drift"), titles, ("ember", "sea"), strict=True):
        values = arrays[name].reshape(len(arrays[name]), -1)
        high = float(values.max()) or 1.0
        heat = Heat(values, 0.0, high, colours, labels, height, range(n_heads, len(labels), n_heads))
        sections.append(Section(title, [heat], _show("mean ", values.mean(1))))
    return sections


def _show(label: str, values: Array) -> Callable[[int], str]:
    return lambda t: label + format_number(float(values[t]))


def _rates(arrays: Arrays) -> list[Section]:
    if "rates" not in arrays:
        return []
    n_steps, n_layers, n_heads, _ = arrays["rates"].shape
    rates = arrays["rates"].reshape(n_steps, -1, len(RATE_LABELS))
    height = min(8.0 * rates.shape[1], 24.0)
    bands = range(n_heads, n_layers * n_heads, n_heads)
    plots = [Heat(rates[..., i], 0.0, 1.0, "poles", [label], height, bands) for i, label in enumerate(RATE_LABELS)]

    def current(t: int) -> str:
        means = rates[t].mean(0)
        return "mean  " + "   ".join(f"{label} {mean:.2f}" for label, mean in zip(RATE_LABELS, means, strict=True))

    return [Section("self-chosen learning rates, rows as above", plots, current)]


def _policy(arrays: Arrays, space: spaces.Space[Any], names: list[str]) -> Section:
    choices = arrays["choices"]
    height = min(max(16.0 * len(names), 32.0), 120.0)
    if isinstance(space, spaces.Box):
        high = float(np.abs(choices).max()) or 1.0
        heat = Heat(choices, -high, high, "poles", names, height)
        return Section("policy: mean of each dimension of the action", [heat])
    heat = Heat(choices, 0.0, probability_limit(choices), "grey", names, height, marks=taken_columns(arrays, space))
    title = "policy: P(bit = 1)" if isinstance(space, spaces.MultiBinary) else "policy: probability of each action"
    return Section(title, [heat])


def probability_limit(choices: Array) -> float:
    """Return the upper end of a scale for probabilities `[T, N]`; a uniform policy reaches half of it."""
    return min(1.0, max(float(choices.max()), 2 / choices.shape[1]))


def _line(title: str, values: Array, low: float, high: float, colour: Colour) -> Section:
    return Section(title, [Curve(values, low, high, colour, 30.0)], _show("", values))


def _limits(values: Array) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high - low > 1e-6 * max(abs(low), abs(high), 1e-30) else (low - 0.5, high + 0.5)


def _entropy(arrays: Arrays, space: spaces.Space[Any]) -> Section:
    values, title = arrays["entropy"], "entropy of the policy, nats"
    if isinstance(space, spaces.Box):  # differential entropy is unbounded
        return _line(title, values, *_limits(values), ORANGE)
    n_columns = arrays["choices"].shape[1]
    if isinstance(space, spaces.MultiDiscrete):
        high = float(np.log(space.nvec).sum())
    else:
        high = log(n_columns) if isinstance(space, spaces.Discrete) else n_columns * log(2)
    return _line(title, values, 0.0, high or 1.0, ORANGE)


def _returns(arrays: Arrays) -> Section:
    rewards, returns = arrays["rewards"].astype(np.float64), running_returns(arrays)
    low, high = (float(end) for end in (min(0, *rewards, *returns), max(0, *rewards, *returns)))
    curve = Curve(returns, low, high if high > low else 1.0, ORANGE, 45.0, bars=rewards)
    show_reward, show_return = _show("reward ", rewards), _show("   return ", returns)
    return Section("reward (bars) and return (line)", [curve], lambda t: show_reward(t) + show_return(t))


def running_returns(arrays: Arrays) -> Array:
    """Return the sum of each episode's rewards up to and including each step, `[T]`."""
    rewards, starts = arrays["rewards"].astype(np.float64), arrays["starts"]
    before = np.cumsum(rewards) - rewards
    returns: Array = before + rewards - before[starts][np.cumsum(starts) - 1]
    return returns
