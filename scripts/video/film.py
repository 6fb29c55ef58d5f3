"""The frames of a film: the game or the observations, the policy's output below, and the panel."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gymnasium import spaces
from PIL import Image, ImageOps

from srwm_rl.scripts.video.canvas import Canvas, fit, font
from srwm_rl.scripts.video.chart import Chart, Heat, Section, format_number
from srwm_rl.scripts.video.colours import BLUE, DIM, EMPTY, GREEN, INK, ORANGE, PAPER, RULE, Bytes, Colour
from srwm_rl.scripts.video.panel import (
    Array,
    Arrays,
    column_names,
    make_panel,
    probability_limit,
    running_returns,
    taken_columns,
)
from srwm_rl.scripts.video.scene import Album
from srwm_rl.scripts.video.trace import Trace

SIZE = (1280, 720)
GAME = 512  # size of ProcGen's pictures
MARGIN = 24
RIGHT = MARGIN + GAME  # of the game
_TOP = 92  # of the game
_PANEL = RIGHT + 28
_POLICY = _TOP + GAME + 16  # title of the policy's output
HOLD = 2  # seconds for which the last frame is shown


class Film:
    """Draws a recording, frame by frame."""

    def __init__(self, trace: Trace, album: Album) -> None:
        self.arrays, self.about, self.space = trace.arrays, trace.about, trace.action_space
        self.n_steps = len(self.arrays["rewards"])
        self.names = column_names(self.space, trace.scene.kind() == "procgen")
        self._taken = taken_columns(self.arrays, self.space)
        self._returns = running_returns(self.arrays)
        self._episodes = np.cumsum(self.arrays["starts"])
        self._starts = np.flatnonzero(self.arrays["starts"])
        self.panel = make_panel((SIZE[0] - MARGIN - _PANEL, SIZE[1] - 2 * 12), self.arrays, self.space, self.names)
        self._album = album
        self._observed = None if album.has_pictures else observation_chart(album.observations(), self.arrays["starts"])

    def n_frames(self, fps: int) -> int:
        """Return the number of frames."""
        return self.n_steps + HOLD * fps

    def frames(self, fps: int) -> Iterator[Bytes]:
        """Yield every frame, `[720, 1280, 3]`: one per step, then the result for `HOLD` seconds."""
        for t in range(self.n_steps):
            yield self.frame(t)
        last = self.frame(self.n_steps - 1, over=True)
        for _ in range(HOLD * fps):
            yield last

    def frame(self, t: int, over: bool = False) -> Bytes:
        """Return the frame of step t; `over`: with the result of its episode."""
        canvas = Canvas(SIZE)
        canvas.paste(self.panel.at(t), _PANEL, 12)
        game = into_square(self._album.picture(t)) if self._observed is None else self._observed.at(t)
        canvas.paste(game, MARGIN, _TOP)
        self._header(canvas, t, over)
        if isinstance(self.space, spaces.Box):
            self._gaussian(canvas, t, _POLICY + 16, SIZE[1] - 34)
        else:
            self._probabilities(canvas, t, _POLICY + 16, SIZE[1] - 34)
        return canvas.pixels()

    def _header(self, canvas: Canvas, t: int, over: bool) -> None:
        status, colour = self._status(t, over)
        canvas.text(RIGHT, 30, status, 17, colour, "r")
        canvas.text(MARGIN, 28, fit(self.about.game, 26, GAME - font(17).getlength(status) - 20), 26)
        level = self.about.describe_level(int(self.arrays["levels"][t]))
        if len(self._starts) > 1:
            level += f"   episode {self._episodes[t]} of {len(self._starts)}"
        canvas.text(MARGIN, 56, level, 14)
        canvas.text(MARGIN, 77, fit(self.about.describe_agent(), 13, GAME), 13, DIM)
        if self._episodes[t] > 1 and not over:
            result, _ = self._result(self._first_step(t) - 1)
            canvas.text(RIGHT, 56, f"previous episode: {result}", 13, DIM, "r")

    def _first_step(self, t: int) -> int:
        """Return the first step of the episode to which step t belongs."""
        return int(self._starts[self._episodes[t] - 1])

    def _status(self, t: int, over: bool) -> tuple[str, Colour]:
        if over and self.arrays["dones"][t]:
            return self._result(t)
        return f"step {t - self._first_step(t)}" + (", stopped here" if over else ""), INK

    def _result(self, t: int) -> tuple[str, Colour]:
        """Return the result of the episode that ends with step t."""
        results = {-1: ("over", INK), 0: ("not solved", ORANGE), 1: ("solved", GREEN)}
        result, colour = results[int(self.arrays["solved"][t])]
        return f"{result}, return {format_number(float(self._returns[t]))}", colour

    def _probabilities(self, canvas: Canvas, t: int, top: int, bottom: int) -> None:
        """Draw a bar per action."""
        probabilities, limit = self.arrays["choices"][t].tolist(), probability_limit(self.arrays["choices"])
        canvas.text(MARGIN, _POLICY, f"policy at this step, bars up to {limit:.2f}", 13, DIM)
        pitch = GAME / len(probabilities)
        inset, interval = min(pitch * 0.12, 6), int(np.ceil(14 / pitch))
        for i, (probability, taken) in enumerate(zip(probabilities, self._taken[t].tolist(), strict=True)):
            left, right = MARGIN + i * pitch + inset, MARGIN + (i + 1) * pitch - inset
            canvas.draw.rectangle((left, top, right, bottom), EMPTY)
            height = probability / limit * (bottom - top)
            canvas.draw.rectangle((left, bottom - height, right, bottom), ORANGE if taken else BLUE)
            if i % interval == 0:
                canvas.text((left + right) / 2, bottom + 13, self.names[i], 14, ORANGE if taken else DIM, "m")
        caption = "orange: taken"
        if isinstance(self.space, spaces.Discrete):
            action = int(self._taken[t].argmax())
            caption = f"taken: {self.names[action]}, probability {probabilities[action]:.2f}"
        canvas.text(RIGHT, _POLICY, caption, 13, ORANGE, "r")

    def _gaussian(self, canvas: Canvas, t: int, top: int, bottom: int) -> None:
        """Draw mean, standard deviation and action of each dimension."""
        canvas.text(MARGIN, _POLICY, "policy at this step", 13, DIM)
        canvas.text(RIGHT, _POLICY, "mean, deviation (box), taken (dot)", 13, DIM, "r")
        means, stds = self.arrays["choices"], self.arrays["std"]
        actions = self.arrays["actions"].reshape(means.shape)
        low = float(min((means - stds).min(), actions.min()))
        high = float(max((means + stds).max(), actions.max()))

        def y(value: float) -> float:
            return bottom - (value - low) / (high - low or 1.0) * (bottom - top)

        pitch = GAME / means.shape[1]
        radius = min(pitch * 0.3, 16)
        for i in range(means.shape[1]):
            mean, std, action = (float(array[t, i]) for array in (means, stds, actions))
            x = MARGIN + (i + 0.5) * pitch
            canvas.draw.rectangle((x - radius, top, x + radius, bottom), EMPTY)
            canvas.draw.rectangle((x - radius, y(mean + std), x + radius, y(mean - std)), RULE)
            canvas.draw.line((x - radius, y(mean), x + radius, y(mean)), BLUE, 2)
            canvas.draw.circle((x, y(action)), min(radius, 4), ORANGE)
            if pitch >= 14:
                canvas.text(x, bottom + 13, self.names[i], 14, DIM, "m")


def into_square(picture: Bytes) -> Bytes:
    """Scale a picture to `GAME` pixels, keeping its aspect ratio; enlarged pixels stay sharp."""
    sharp = 1.5 * max(picture.shape[:2]) < GAME
    method = Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS
    return np.asarray(ImageOps.pad(Image.fromarray(picture), (GAME, GAME), method, PAPER))


def observation_chart(observations: Arrays, starts: Array) -> Chart:
    """Return a chart with a section, on its own scale, per part of the observation."""
    sections = []
    for name, values in observations.items():
        low, high = min(0.0, float(values.min())), float(np.abs(values).max()) or 1.0
        n_rows = values.shape[1]
        labels = [str(i) for i in range(n_rows)] if n_rows > 1 else [""]
        limits = (-high, high, "poles") if low < 0 else (0.0, high, "sea")
        heat = Heat(values, *limits, labels, float(min(n_rows, 64)) + 1)
        sections.append(Section(f"observed: {name.replace('_', ' ')}", [heat]))
    return Chart((GAME, GAME), sections, starts, (34, 44))
