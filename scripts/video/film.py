"""The film's frames: the game or what is observed of it, the policy below, and the panel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from PIL import Image

from srwm_rl.scripts.video.canvas import Canvas, fit, width
from srwm_rl.scripts.video.chart import Chart, Heat, Section, number
from srwm_rl.scripts.video.colours import BLUE, DIM, EMPTY, GREEN, INK, ORANGE, PAPER, RULE, Bytes
from srwm_rl.scripts.video.panel import Arrays, choice_names, chosen, highest, panel, running_returns

SIZE = (1280, 720)
GAME = 512  # ProcGen's own picture
MARGIN = 24
_TOP = 92  # of the game
_PANEL = MARGIN + GAME + 28
HOLD = 2  # seconds that the result stays


@dataclass(frozen=True)
class Titles:
    """The words above the game."""

    game: str
    level: Callable[[int], str]
    """Says a level, and what it is to the agent: "held-out level 1003"."""
    about: str


class Film:
    """Draws a recording, frame by frame.

    Args:
        arrays: what `srwm_rl.agents.evaluation.recording.collect` gave, T steps.
        titles: the words above.
        picture: the game at step t, uint8 `[height, width, 3]`; None: draw the observations instead.
        observations: name -> `[T, n]`, what the agent saw, where there are no pictures.
        space: of the actions.
        is_procgen: whether the actions have ProcGen's names.
    """

    def __init__(
        self,
        arrays: Arrays,
        titles: Titles,
        picture: Callable[[int], Bytes] | None,
        observations: Arrays,
        space: spaces.Space[Any],
        is_procgen: bool,
    ) -> None:
        self.arrays, self.titles, self.picture, self.space = arrays, titles, picture, space
        self.n_steps = len(arrays["rewards"])
        self.names = choice_names(space, is_procgen)
        self._chosen = chosen(arrays, space)
        self._returns = running_returns(arrays)
        self._episodes = np.cumsum(arrays["starts"])
        size = (SIZE[0] - MARGIN - _PANEL, SIZE[1] - 2 * 12)
        self.panel = panel(size, arrays, space, self.names)
        self._seen = None if picture is not None else observation_chart((GAME, GAME), observations, arrays["starts"])

    def count(self, fps: int) -> int:
        """Return how many frames there are."""
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
        canvas = Canvas.blank(SIZE)
        canvas.image.paste(Image.fromarray(self.panel.at(t)), (_PANEL, 12))
        canvas.image.paste(self._game(t), (MARGIN, _TOP))
        self._head(canvas, t, over)
        self._policy_now(canvas, t)
        return np.asarray(canvas.image)

    def _game(self, t: int) -> Image.Image:
        if self.picture is None:
            assert self._seen is not None
            return Image.fromarray(self._seen.at(t))
        return into_square(self.picture(t))

    def _head(self, canvas: Canvas, t: int, over: bool) -> None:
        right = MARGIN + GAME
        words, colour = self._status(t, over)
        canvas.text(right, 30, words, 17, colour, "r")
        room = GAME - width(words, 17) - 20
        canvas.text(MARGIN, 28, fit(self.titles.game, 26, room), 26)
        level = self.titles.level(int(self.arrays["levels"][t]))
        if self._episodes[-1] > 1:
            level += f"   episode {self._episodes[t]} of {self._episodes[-1]}"
        canvas.text(MARGIN, 56, level, 14, INK)
        canvas.text(MARGIN, 77, fit(self.titles.about, 13, GAME), 13, DIM)
        if t and self._episodes[t] > 1 and not over:
            canvas.text(right, 56, f"previous episode: {self._result(self._last_end(t))[0]}", 13, DIM, "r")

    def _last_end(self, t: int) -> int:
        return int(np.flatnonzero(self.arrays["starts"][: t + 1])[-1]) - 1

    def _status(self, t: int, over: bool) -> tuple[str, tuple[int, int, int]]:
        if over and self.arrays["dones"][t]:
            return self._result(t)
        start = int(np.flatnonzero(self.arrays["starts"][: t + 1])[-1])
        return f"step {t - start}" + (", stopped here" if over else ""), INK

    def _result(self, t: int) -> tuple[str, tuple[int, int, int]]:
        """Say how the episode that ends with step t went."""
        words, colour = {-1: ("over", INK), 0: ("not solved", ORANGE), 1: ("solved", GREEN)}[
            int(self.arrays["solved"][t])
        ]
        return f"{words}, return {number(float(self._returns[t]))}", colour

    def _policy_now(self, canvas: Canvas, t: int) -> None:
        top, bottom = _TOP + GAME + 32, SIZE[1] - 34
        if isinstance(self.space, spaces.Box):
            self._spread(canvas, t, top, bottom)
        else:
            self._bars(canvas, t, top, bottom)

    def _bars(self, canvas: Canvas, t: int, top: int, bottom: int) -> None:
        chances, marks, top_of_scale = self.arrays["choices"][t], self._chosen[t], highest(self.arrays["choices"])
        canvas.text(MARGIN, _TOP + GAME + 16, f"policy at this step, bars up to {top_of_scale:.2f}", 13, DIM)
        pitch = GAME / len(chances)
        inset = min(pitch * 0.12, 6)
        for i, (chance, mark) in enumerate(zip(chances.tolist(), marks.tolist(), strict=True)):
            left, right = MARGIN + i * pitch + inset, MARGIN + (i + 1) * pitch - inset
            canvas.draw.rectangle((left, top, right, bottom), EMPTY)
            canvas.draw.rectangle(
                (left, bottom - chance / top_of_scale * (bottom - top), right, bottom), ORANGE if mark else BLUE
            )
            if pitch >= 14 or i % int(np.ceil(14 / pitch)) == 0:
                canvas.sign((left + right) / 2, bottom + 13, self.names[i], 14, ORANGE if mark else DIM)
        if isinstance(self.space, spaces.Discrete):
            action = int(np.flatnonzero(marks)[0])
            words = f"taken: {self.names[action]}, probability {chances[action]:.2f}"
            canvas.text(MARGIN + GAME, _TOP + GAME + 16, words, 13, ORANGE, "r")
        else:
            canvas.text(MARGIN + GAME, _TOP + GAME + 16, "orange: taken", 13, ORANGE, "r")

    def _spread(self, canvas: Canvas, t: int, top: int, bottom: int) -> None:
        canvas.text(MARGIN, _TOP + GAME + 16, "policy at this step", 13, DIM)
        means, stds = self.arrays["choices"], self.arrays["std"]
        actions = self.arrays["actions"].reshape(len(means), -1)
        low = float(min((means - stds).min(), actions.min()))
        high = float(max((means + stds).max(), actions.max()))

        def place(value: float) -> float:
            return bottom - (value - low) / (high - low or 1.0) * (bottom - top)

        pitch = GAME / means.shape[1]
        reach = min(pitch * 0.3, 16)
        for i in range(means.shape[1]):
            x = MARGIN + (i + 0.5) * pitch
            canvas.draw.rectangle((x - reach, top, x + reach, bottom), EMPTY)
            mean, std = float(means[t, i]), float(stds[t, i])
            canvas.draw.rectangle((x - reach, place(mean + std), x + reach, place(mean - std)), RULE)
            canvas.draw.line([(x - reach, place(mean)), (x + reach, place(mean))], BLUE, 2)
            canvas.draw.circle((x, place(float(actions[t, i]))), min(reach, 4), ORANGE)
            if pitch >= 14:
                canvas.text(x, bottom + 13, self.names[i], 14, DIM, "m")
        canvas.text(MARGIN + GAME, _TOP + GAME + 16, "mean, deviation (box), taken (dot)", 13, DIM, "r")


def into_square(picture: Bytes) -> Image.Image:
    """Return a picture as large as it fits into the game's place, its shape kept."""
    image = Image.fromarray(picture)
    if image.size == (GAME, GAME):
        return image
    scale = GAME / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Enlarged pixels stay pixels.
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1.5 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (GAME, GAME), PAPER)
    square.paste(image, ((GAME - size[0]) // 2, (GAME - size[1]) // 2))
    return square


def observation_chart(size: tuple[int, int], observations: Arrays, starts: npt.NDArray[Any]) -> Chart:
    """Return a chart of what an agent saw: a section per part of the observation, each on its own scale."""
    sections = []
    for name, values in observations.items():
        low, high = float(values.min()), float(values.max())
        if low < 0:
            high = max(-low, high)
            low = -high
        else:
            low, high = 0.0, high or 1.0
        n_rows = values.shape[1]
        labels = [str(i) for i in range(n_rows)] if n_rows > 1 else [""]
        heat = Heat(values, low, high, "poles" if low < 0 else "sea", labels, min(n_rows, 64) + 1.0)
        heat = Heat(values, low, high, "poles" if low < 0 else "sea", labels, float(min(len(labels), 64)) + 1)
        sections.append(Section(f"observed: {name.replace('_', ' ')}", [heat]))
    return Chart(size, sections, starts, (34, 44))
