"""The frames of a film: the game or the observations, the policy's output below, and the panel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat

import numpy as np
from gymnasium import spaces
from PIL import Image, ImageOps

from srwm_rl.scripts.video.canvas import (
    BLUE,
    DIM,
    EMPTY,
    GREEN,
    INK,
    ORANGE,
    PAPER,
    RULE,
    SMALLEST,
    Bytes,
    Canvas,
    fit,
    font,
)
from srwm_rl.scripts.video.chart import Chart, Heat, Section, format_number
from srwm_rl.scripts.video.panel import (
    Array,
    Arrays,
    make_panel,
    policy_columns,
    probability_limit,
    running_returns,
)
from srwm_rl.scripts.video.scene import Album
from srwm_rl.scripts.video.trace import Trace

SIZE = (1280, 720)
GAME = 512  # size of ProcGen's pictures
MARGIN = 24
RIGHT = MARGIN + GAME  # of the game
TOP = 92  # of the game
_PANEL = RIGHT + 28
POLICY = TOP + GAME + 16  # title of the policy's output
COLUMNS = (SIZE[1] - 34, POLICY + 16)  # bottom and top of its columns
HOLD = 2  # seconds for which the last frame is shown


class Film:
    """Draws a recording, frame by frame."""

    def __init__(self, trace: Trace, album: Album) -> None:
        self.arrays, self.about, self.space = trace.arrays, trace.about, trace.action_space
        self.n_steps = len(self.arrays["rewards"])
        scene = trace.scene
        self.columns = policy_columns(self.arrays, self.space, scene.action_names(), scene.idle_actions())
        self.names, self._taken = self.columns.names, self.columns.taken
        self._is_box = isinstance(self.space, spaces.Box)
        self._limits = self._policy_limits()
        self._returns = running_returns(self.arrays)
        self._episodes = np.cumsum(self.arrays["starts"])
        self._attempts = self.arrays.get("attempts")
        self._of_attempts = f" of {trace.scene.attempts}" if trace.scene.attempts > 1 else ""
        self._starts = np.flatnonzero(self.arrays["starts"])
        size = SIZE[0] - MARGIN - _PANEL, SIZE[1] - 2 * 12
        self.panel = make_panel(size, self.arrays, self.space, self.columns, trace.head_costs)
        self._album = album
        self._observed = None
        if not album.has_pictures:
            features, actions = scene.feature_names(), scene.action_names()
            labels = {"observation": features, "previous_observation": features, "previous_action": actions}
            self._observed = observation_chart(album.observations(), self.arrays["starts"], labels)

    def n_frames(self, fps: int) -> int:
        """Return the number of frames."""
        return self.n_steps + HOLD * fps

    def frames(self, fps: int) -> Iterator[Bytes]:
        """Yield every frame, `[720, 1280, 3]`: one per step, then the result for `HOLD` seconds."""
        yield from map(self.frame, range(self.n_steps))
        yield from repeat(self.frame(self.n_steps - 1, over=True), HOLD * fps)

    def frame(self, t: int, over: bool = False) -> Bytes:
        """Return the frame of step t; `over`: with the result of its episode."""
        canvas = Canvas(SIZE)
        canvas.paste(self.panel.at(t), _PANEL, 12)
        game = into_square(self._album.picture(t)) if self._observed is None else self._observed.at(t)
        canvas.paste(game, MARGIN, TOP)
        self._header(canvas, t, over)
        self._policy(canvas, t)
        return canvas.pixels()

    def _header(self, canvas: Canvas, t: int, over: bool) -> None:
        start, n_episodes = self._starts[self._episodes[t] - 1], len(self._starts)
        status, colour = f"step {t - start}" + (", stopped here" if over else ""), INK
        if over and self.arrays["dones"][t]:
            status, colour = self._result(t)
        canvas.text(RIGHT, 30, status, 17, colour, "r")
        canvas.text(MARGIN, 28, fit(self.about.game, 26, GAME - font(17).getlength(status) - 20), 26)
        level = self.about.describe_level(int(self.arrays["levels"][t]))
        episode = f"   episode {self._episodes[t]} of {n_episodes}" if n_episodes > 1 else ""
        attempt = "" if self._attempts is None else f"   attempt {self._attempts[t] + 1}{self._of_attempts}"
        canvas.text(MARGIN, 56, level + episode + attempt, 14)
        canvas.text(MARGIN, 77, fit(self.about.describe_agent(), 13, GAME), 13, DIM)
        if self._attempts is not None:
            canvas.text(RIGHT, 56, self._attempt_returns(start, t, over), 13, DIM, "r")
        elif start and not over:
            canvas.text(RIGHT, 56, f"previous episode: {self._result(start - 1)[0]}", 13, DIM, "r")

    def _attempt_returns(self, start: int, t: int, over: bool) -> str:
        """Return as text the latest returns of the attempts that have ended since step `start`."""
        attempts, rewards = self.arrays["attempts"][start : t + 1], self.arrays["rewards"][start : t + 1]
        n_ended = attempts[-1] + (over and bool(self.arrays["dones"][t]))
        returns = [format_number(float(rewards[attempts == k].sum())) for k in range(n_ended)]
        return f"by attempt: {'... ' if n_ended > 4 else ''}{', '.join(returns[-4:])}" if returns else ""

    def _result(self, t: int) -> tuple[str, tuple[int, int, int]]:
        """Return the result of the episode that ends with step t, and its colour."""
        results = {-1: ("over", INK), 0: ("not solved", ORANGE), 1: ("solved", GREEN)}
        result, colour = results[int(self.arrays["solved"][t])]
        return f"{result}, return {format_number(float(self._returns[t]))}", colour

    def _policy_limits(self) -> tuple[float, float]:
        """Return the ends of the scale of the policy's output."""
        choices = self.columns.values
        if not self._is_box:
            return 0.0, probability_limit(choices)
        stds, actions = self.arrays["std"], self.arrays["actions"]
        return float(min((choices - stds).min(), actions.min())), float(max((choices + stds).max(), actions.max()))

    def _policy(self, canvas: Canvas, t: int) -> None:
        """Draw the policy's output, a column for each action or dimension."""
        title, caption, colour = "policy at this step", "mean, deviation (box), taken (dot)", DIM
        if not self._is_box:
            title, caption, colour = f"{title}, bars up to {self._limits[1]:.2f}", "orange: taken", ORANGE
        if isinstance(self.space, spaces.Discrete):
            action = int(self._taken[t].argmax())
            caption = f"taken: {self.names[action]}, probability {self.columns.values[t, action]:.2f}"
        canvas.text(MARGIN, POLICY, title, 13, DIM)
        canvas.text(RIGHT, POLICY, caption, 13, colour, "r")
        pitch = GAME / len(self.names)
        radius = min(pitch * 0.3, 16) if self._is_box else pitch / 2 - min(pitch * 0.12, 6)
        interval = int(np.ceil(max(14, *(font(14).getlength(name) + 4 for name in self.names)) / pitch))
        for i, (name, taken) in enumerate(zip(self.names, self._taken[t], strict=True)):
            x = MARGIN + (i + 0.5) * pitch
            canvas.draw.rectangle((x - radius, COLUMNS[1], x + radius, COLUMNS[0]), EMPTY)
            (self._gaussian if self._is_box else self._bar)(canvas, t, i, x, radius)
            if i % interval == 0:
                canvas.text(x, COLUMNS[0] + 13, name, 14, ORANGE if taken else DIM, "m")

    def _y(self, value: float) -> float:
        return float(np.interp(value, self._limits, COLUMNS))

    def _bar(self, canvas: Canvas, t: int, i: int, x: float, radius: float) -> None:
        colour = ORANGE if self._taken[t, i] else BLUE
        canvas.draw.rectangle((x - radius, self._y(self.columns.values[t, i]), x + radius, COLUMNS[0]), colour)

    def _gaussian(self, canvas: Canvas, t: int, i: int, x: float, radius: float) -> None:
        """Draw mean, standard deviation and action of dimension i."""
        mean, std, action = (self.arrays[name][t].ravel()[i] for name in ("choices", "std", "actions"))
        canvas.draw.rectangle((x - radius, self._y(mean + std), x + radius, self._y(mean - std)), RULE)
        canvas.draw.line((x - radius, self._y(mean), x + radius, self._y(mean)), BLUE, 2)
        canvas.draw.circle((x, self._y(action)), min(radius, 4), ORANGE)


def into_square(picture: Bytes, size: int = GAME) -> Bytes:
    """Scale a picture to `size` x `size` pixels, keeping its aspect ratio; enlarged pixels stay sharp."""
    sharp = 1.5 * max(picture.shape[:2]) < size
    method = Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS
    return np.asarray(ImageOps.pad(Image.fromarray(picture), (size, size), method, PAPER))


def observation_chart(observations: Arrays, starts: Array, names: Mapping[str, Sequence[str]] | None = None) -> Chart:
    """Return a chart with a section, on its own scale, per part of the observation.

    `names` are those of a part's elements, by part; they are numbered where there are not as many as elements.
    """
    sections, widest = [], 0.0
    for name, values in observations.items():
        low, high = min(0.0, float(values.min())), float(np.abs(values).max()) or 1.0
        n_rows = values.shape[1]
        labels = list((names or {}).get(name, ()))
        if len(labels) != n_rows:
            labels = [str(i) for i in range(n_rows)] if n_rows > 1 else [""]
        widest = max(widest, *(font(SMALLEST if n_rows > 1 else 13).getlength(label) for label in labels))
        limits = (-high, high, "poles") if low < 0 else (0.0, high, "sea")
        heat = Heat(values, *limits, labels, float(min(n_rows, 64)) + 1)
        sections.append(Section(f"observed: {name.replace('_', ' ')}", [heat]))
    return Chart((GAME, GAME), sections, starts, (max(34, round(widest) + 12), 44))
