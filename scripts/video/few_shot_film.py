"""The frames of a film of few-shot episodes: the image, what was told of it, and the examples so far by label."""

from __future__ import annotations

import numpy as np

from srwm_rl.scripts.video.canvas import BLUE, DIM, EMPTY, GREEN, INK, ORANGE, RULE, Bytes, Canvas, Colour
from srwm_rl.scripts.video.film import COLUMNS, GAME, MARGIN, POLICY, RIGHT, SIZE, TOP, Film, into_square
from srwm_rl.scripts.video.panel import running_accuracy
from srwm_rl.scripts.video.scene import Album
from srwm_rl.scripts.video.trace import Trace

FPS = 2  # slow enough to read each question and its label
IMAGE = 260  # size of the image in pixels
_TEXT = MARGIN + IMAGE + 24  # left of what is said about it
_SHELF = TOP + IMAGE + 40  # top of the examples
_GAP = 4


class FewShotFilm(Film):
    """Draws a recording of few-shot episodes, frame by frame."""

    def __init__(self, trace: Trace, album: Album) -> None:
        super().__init__(trace, album)
        self._accuracy = running_accuracy(self.arrays)
        self._examples = _example_steps(self.arrays)
        kwargs = dict(pair.partition(":")[::2] for pair in trace.scene.env_kwargs)
        self._n_parts = len(kwargs.get("data", "glyphs").split(","))
        self._pitch = GAME / len(self.names)

    def frame(self, t: int, over: bool = False) -> Bytes:
        """Return the frame of step t; `over`: with the result of its episode."""
        canvas = Canvas(SIZE)
        canvas.paste(self.panel.at(t), RIGHT + 28, 12)
        self._header(canvas, t, over)
        canvas.paste(into_square(self._album.picture(t), IMAGE), MARGIN, TOP)
        self._question(canvas, t)
        self._shelf(canvas, t)
        self._guess(canvas, t)
        return canvas.pixels()

    def _result(self, t: int) -> tuple[str, Colour]:
        return f"over, {self._score(t)} right", INK

    def _score(self, t: int) -> str:
        start = self._starts[self._episodes[t] - 1]
        asked = self.arrays["answer"][start : t + 1] >= 0
        right = asked & (self.arrays["answer"][start : t + 1] == self.arrays["actions"][start : t + 1])
        return f"{right.sum()} of {asked.sum()}"

    def _question(self, canvas: Canvas, t: int) -> None:
        """Write what the step tells or asks, the guess, and the accuracy so far."""
        told, answer, guess = (int(self.arrays[name][t]) for name in ("told", "answer", "actions"))
        lines: list[tuple[str, int, Colour]] = []
        if self.arrays["own"][t]:
            lines.append((f"told: label {told}", 26, ORANGE))
        elif told >= 0 and not self.arrays["query"][t]:
            lines.append((f"told: the last one was {told}", 17, ORANGE))
        if answer >= 0:
            probability = float(self.arrays["choices"][t, guess])
            lines += [("which label?", 26, INK), (f"guess: {guess}, probability {probability:.2f}", 17, BLUE)]
            lines.append(("right", 26, GREEN) if guess == answer else (f"wrong, it is {answer}", 26, ORANGE))
        seen = int(self.arrays["seen"][t])
        kind = "query" if self.arrays["query"][t] else "example"
        lines.append((f"{kind}; {seen} of its class before", 14, DIM))
        if self._n_parts > 1:
            lines.append((f"part {self.arrays['part'][t] + 1} of {self._n_parts}", 14, DIM))
        y = TOP + 16.0
        for text, size, colour in lines:
            canvas.text(_TEXT, y, text, size, colour)
            y += size + 16
        score = f"right so far: {self._score(t)}"
        canvas.text(_TEXT, TOP + IMAGE - 40, f"{100 * self._accuracy[t]:.0f}%", 34, GREEN)
        canvas.text(_TEXT, TOP + IMAGE - 10, score, 14, DIM)

    def _shelf(self, canvas: Canvas, t: int) -> None:
        """Draw the examples whose labels have been told in the episode, the latest ones, above their labels."""
        start = self._starts[self._episodes[t] - 1]
        canvas.text(MARGIN, _SHELF - 14, "examples told in this episode, by label", 13, DIM)
        size = int(min(self._pitch - 2 * _GAP, 56))
        n_rows = max(1, (POLICY - 12 - _SHELF) // (size + _GAP))
        for label in range(len(self.names)):
            steps = [s for s, known in self._examples if start <= s and known <= t and self.arrays["label"][s] == label]
            x = round(MARGIN + (label + 0.5) * self._pitch - size / 2)
            for row, s in enumerate(steps[-n_rows:]):
                y = _SHELF + row * (size + _GAP)
                canvas.paste(into_square(self._album.picture(s), size), x, y)
                if (s, t) in self._examples:
                    canvas.draw.rectangle((x - 1, y - 1, x + size, y + size), None, ORANGE, 2)

    def _guess(self, canvas: Canvas, t: int) -> None:
        """Draw the probabilities of the labels: dimmed where nothing is asked, the right one with a frame."""
        answer, asked = int(self.arrays["answer"][t]), self.arrays["answer"][t] >= 0
        canvas.text(MARGIN, POLICY, "guess, probability of each label" if asked else "nothing is asked", 13, DIM)
        canvas.text(RIGHT, POLICY, "green frame: the right one" if asked else "", 13, GREEN, "r")
        radius = self._pitch / 2 - min(self._pitch * 0.12, 6)
        bottom, top = COLUMNS
        for label, name in enumerate(self.names):
            x = MARGIN + (label + 0.5) * self._pitch
            canvas.draw.rectangle((x - radius, top, x + radius, bottom), EMPTY)
            height = float(np.interp(self.arrays["choices"][t, label], (0.0, 1.0), (0.0, bottom - top)))
            colour = RULE if not asked else ORANGE if self._taken[t, label] else BLUE
            canvas.draw.rectangle((x - radius, bottom - height, x + radius, bottom), colour)
            if label == answer:
                canvas.draw.rectangle((x - radius, top, x + radius, bottom), None, GREEN, 2)
            if label % int(np.ceil(14 / self._pitch)) == 0:
                canvas.text(x, bottom + 13, name, 14, INK if label == answer else DIM, "m")


def _example_steps(arrays: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """Return each example's step, and the step at which its label is told: with delayed labels the next one."""
    if arrays["own"].any():
        return [(int(s), int(s)) for s in np.flatnonzero(arrays["own"])]
    told = (arrays["told"][1:] >= 0) & ~arrays["starts"][1:]
    return [(int(s), int(s) + 1) for s in np.flatnonzero(told)]
