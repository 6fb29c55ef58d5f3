"""The panel beside the game: a recording's arrays as sections of a chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from srwm_rl.agents.evaluation.head_costs import HeadCost
from srwm_rl.envs.procgen.games import ACTIONS
from srwm_rl.scripts.video.canvas import GREEN, ORANGE, SMALLEST, font
from srwm_rl.scripts.video.chart import Chart, Curve, Heat, Section, format_number

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

NOTHING = ACTIONS.index("nothing")
RATE_LABELS = ("y", "q", "k", "beta")


class Columns(NamedTuple):
    """The columns of the policy's output: one per action, or per dimension of a Box action."""

    names: list[str]
    values: Array  # [T, N]: probabilities, or means
    taken: Array  # [T, N] bool


class Heads(NamedTuple):
    """The rows of the heads in a panel."""

    order: Array  # [L * H]: the number `layer * H + head` of each row
    labels: list[str]
    dimmed: Array | None  # [L * H] bool
    bands: Sequence[int]  # rows with a line above


def head_rows(n_layers: int, n_heads: int, costs: Sequence[HeadCost] = ()) -> Heads:
    """Return the rows of the heads: by layer, or if the costs of all are known, ranked by them, the others dimmed.

    Dimmed are those whose lesion costs nothing, so far as its interval says.
    """
    names = [f"{layer}.{head}" if n_heads > 1 else str(layer) for layer in range(n_layers) for head in range(n_heads)]
    known = {cost.layer * n_heads + cost.head: cost for cost in costs if cost.head < n_heads}
    if known.keys() != {*range(len(names))}:
        return Heads(np.arange(len(names)), names, None, range(n_heads, len(names), n_heads))
    order = sorted(known, key=lambda i: (not known[i].earns, -known[i].mean))
    dimmed = np.array([not known[i].earns for i in order])
    bands = [int(dimmed.argmax())] if dimmed.any() and not dimmed.all() else []
    return Heads(np.array(order), [f"{names[i]}  {known[i].mean or 0:+.2g}" for i in order], dimmed, bands)


def make_panel(
    size: tuple[int, int],
    arrays: Arrays,
    space: spaces.Space[Any],
    columns: Columns,
    costs: Sequence[HeadCost] = (),
) -> Chart:
    """Return the panel of a recording; `columns` are those of the policy, `costs` of lesioning its heads."""
    n_layers, n_heads = arrays["edit"].shape[1:]
    heads = head_rows(n_layers, n_heads, costs)
    values, entropy, rewards, returns = arrays["values"], arrays["entropy"], arrays["rewards"], running_returns(arrays)
    # Differential entropy is unbounded.
    limits = _limits(entropy) if isinstance(space, spaces.Box) else (0.0, float(np.log(_n_choices(space)).sum()) or 1.0)
    low, high = (float(end([0, *rewards, *returns])) for end in (min, max))
    earned = Curve(returns, low, high if high > low else 1.0, ORANGE, 45.0, bars=rewards)
    show_reward, show_return = _show("reward ", rewards), _show("   return ", returns)
    last = [
        Section("value", [Curve(values, *_limits(values), GREEN, 30.0)], _show("", values)),
        Section("entropy of the policy, nats", [Curve(entropy, *limits, ORANGE, 30.0)], _show("", entropy)),
        Section("reward (bars) and return (line)", [earned], lambda t: show_reward(t) + show_return(t)),
    ]
    if "answer" in arrays:  # learned from right answers: the value was not
        accuracy, right = running_accuracy(arrays), (arrays["actions"] == arrays["answer"]).astype(float)
        curve = Curve(100 * accuracy, 0.0, 100.0, GREEN, 60.0, bars=100 * right)
        last = [
            last[1],
            Section("right answers (bars), accuracy so far in % (line)", [curve], _show("", 100 * accuracy)),
        ]
    sections = [*_changes(arrays, heads), *_rates(arrays, heads), _policy(columns, space), *last]
    widest = max((font(SMALLEST).getlength(label) for label in heads.labels), default=0)
    # Labels of many heads stand in two columns, 15 pixels apart.
    return Chart(size, sections, arrays["starts"], (max(64, round(widest) + 27), 52))


def _n_choices(space: spaces.Space[Any]) -> Array:
    """Return the number of alternatives of each part of a discrete action."""
    if isinstance(space, spaces.MultiBinary):
        return np.full(space.shape, 2).ravel()
    return np.ravel(space.nvec if isinstance(space, spaces.MultiDiscrete) else space.n)  # type: ignore[attr-defined]


def policy_columns(
    arrays: Arrays, space: spaces.Space[Any], names: Sequence[str] = (), idle: Sequence[int] = ()
) -> Columns:
    """Return the columns of a recording's policy.

    `names` are those of Discrete actions. The actions `idle`, of ProcGen, do nothing: they share the column of one.
    """
    all_names = list(names) if isinstance(space, spaces.Discrete) and len(names) == space.n else column_names(space)
    values, taken = arrays["choices"], taken_columns(arrays, space)
    if idle:
        values, taken = values.copy(), taken.copy()
        values[:, NOTHING] = values[:, list(idle)].sum(1)
        taken[:, NOTHING] = taken[:, list(idle)].any(1)
    shown = [i for i in range(len(all_names)) if i == NOTHING or i not in idle]
    return Columns([all_names[i] for i in shown], values[:, shown], taken[:, shown])


def column_names(space: spaces.Space[Any]) -> list[str]:
    """Number the N columns of the policy's output: one per action, or per dimension of a Box action."""
    if isinstance(space, spaces.MultiDiscrete):
        return [f"{part}:{i}" for part, n in enumerate(_n_choices(space)) for i in range(n)]
    n_columns = space.n if isinstance(space, spaces.Discrete) else np.prod(space.shape or (1,))
    return [str(i) for i in range(int(n_columns))]


def taken_columns(arrays: Arrays, space: spaces.Space[Any]) -> Array:
    """Return which of the policy's columns each action consists of, `[T, N]` bool; none for Box actions."""
    taken = np.zeros(arrays["choices"].shape, np.bool_)
    actions = arrays["actions"].reshape(len(taken), -1)
    if isinstance(space, spaces.MultiBinary):
        return actions.astype(np.bool_)
    if not isinstance(space, spaces.Box):
        sizes = _n_choices(space)
        np.put_along_axis(taken, actions + np.cumsum(sizes) - sizes, True, axis=1)
    return taken


def _changes(arrays: Arrays, heads: Heads) -> list[Section]:
    if not arrays["edit"].size:  # a core without memory
        return []
    n_heads = arrays["edit"].shape[2]
    edit, drift = "change of the state, Euclidean norm", "state, Euclidean norm"
    if "rates" in arrays:
        edit, drift = "edit  |W(t+1) - W(t)|, Frobenius norm", "drift  |W(t) - W(0)|, Frobenius norm"
    height = min(max(14.0 * len(heads.labels), 24.0), 70.0)
    where = ", per layer.head" if n_heads > 1 else ", per layer"
    if heads.dimmed is not None:
        edit, drift = f"{edit.partition(',')[0]}, and what lesioning each head costs", drift.partition(",")[0]
        where = "; dim: nothing" if heads.dimmed.any() else ""
    sections = []
    for name, title, colours in (("edit", edit, "ember"), ("drift", drift, "sea")):
        values = arrays[name].reshape(len(arrays[name]), -1)
        high = float(values.max()) or 1.0
        heat = Heat(values[:, heads.order], 0.0, high, colours, heads.labels, height, heads.bands, dimmed=heads.dimmed)
        sections.append(Section(title + where, [heat], _show("mean ", values.mean(1))))
    return sections


def _show(label: str, values: Array) -> Callable[[int], str]:
    return lambda t: label + format_number(float(values[t]))


def _rates(arrays: Arrays, heads: Heads) -> list[Section]:
    if "rates" not in arrays:
        return []
    rates = arrays["rates"].reshape(len(arrays["rates"]), -1, len(RATE_LABELS))
    height = min(8.0 * rates.shape[1], 24.0)
    plots = [
        Heat(rates[:, heads.order, i], 0.0, 1.0, "poles", [label], height, heads.bands, dimmed=heads.dimmed)
        for i, label in enumerate(RATE_LABELS)
    ]

    def current(t: int) -> str:
        means = zip(RATE_LABELS, rates[t].mean(0), strict=True)
        return "mean  " + "   ".join(f"{label} {mean:.2f}" for label, mean in means)

    return [Section("self-chosen learning rates, rows as above", plots, current)]


def _policy(columns: Columns, space: spaces.Space[Any]) -> Section:
    names, choices, taken = columns
    height = min(max(16.0 * len(names), 32.0), 120.0)
    if isinstance(space, spaces.Box):
        high = float(np.abs(choices).max()) or 1.0
        heat = Heat(choices, -high, high, "poles", names, height)
        return Section("policy: mean of each dimension of the action", [heat])
    heat = Heat(choices, 0.0, probability_limit(choices), "grey", names, height, marks=taken)
    title = "policy: P(bit = 1)" if isinstance(space, spaces.MultiBinary) else "policy: probability of each action"
    return Section(title, [heat])


def probability_limit(choices: Array) -> float:
    """Return the upper end of a scale for probabilities `[T, N]`; a uniform policy reaches half of it."""
    return min(1.0, max(float(choices.max()), 2 / choices.shape[1]))


def _limits(values: Array) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high - low > 1e-6 * max(abs(low), abs(high), 1e-30) else (low - 0.5, high + 0.5)


def running_accuracy(arrays: Arrays) -> Array:
    """Return the fraction of right answers of each episode up to and including each step, `[T]`; 0 before the first."""
    asked = arrays["answer"] >= 0
    episodes = np.flatnonzero(arrays["starts"])[1:]
    right = np.split((arrays["actions"] == arrays["answer"]) & asked, episodes)
    counts = [np.maximum(np.cumsum(of), 1) for of in np.split(asked, episodes)]
    return np.concatenate([np.cumsum(of) / n for of, n in zip(right, counts, strict=True)])


def running_returns(arrays: Arrays) -> Array:
    """Return the sum of each episode's rewards up to and including each step, `[T]`."""
    rewards, starts = arrays["rewards"].astype(np.float64), arrays["starts"]
    return np.concatenate([np.cumsum(episode) for episode in np.split(rewards, np.flatnonzero(starts)[1:])])
