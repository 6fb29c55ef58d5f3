"""A picture of the room of `hidden_controls`: the agent, the goal, and below what each action does."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from srwm_rl.envs.levels import IntArray

SIZE = 512  # pixels of a side, as ProcGen's pictures
ROOM = 400  # of the room's side
_LEFT, _TOP = (SIZE - ROOM) // 2, 6
_CAPTION, _KEYS = _TOP + ROOM + 18, (_TOP + ROOM + 34, SIZE - 6)  # middle of the text; top and bottom of the boxes
_PAPER, _CELL, _RULE = (14, 17, 21), (30, 36, 43), (58, 66, 75)
_DIM, _INK, _AGENT, _GOAL, _FLASH = (150, 160, 170), (234, 237, 240), (245, 166, 72), (110, 205, 150), (244, 247, 194)
_ARROWS = {
    (-1, 0): "↑",
    (1, 0): "↓",
    (0, -1): "←",
    (0, 1): "→",
    (-1, -1): "↖",
    (-1, 1): "↗",
    (1, -1): "↙",
    (1, 1): "↘",
}


def draw_room(
    size: int, agent: IntArray, goal: IntArray, came_from: IntArray | None, moves: IntArray, flash: bool = False
) -> npt.NDArray[np.uint8]:
    """Return a picture `[512, 512, 3]`.

    Args:
        size: Cells along a side.
        agent: Row and column of the agent.
        goal: Row and column of the goal.
        came_from: Row and column of the agent before its last move; None: an attempt begins.
        moves: What each action does, `[n_actions, 2]`, rows and columns.
        flash: Whether the flash is shown: the room's border is bright.
    """
    image = Image.new("RGB", (SIZE, SIZE), _PAPER)
    draw, cell = ImageDraw.Draw(image), ROOM / size
    draw.rectangle((_LEFT - 4, _TOP - 4, _LEFT + ROOM + 3, _TOP + ROOM + 3), _FLASH if flash else _RULE)
    for row, column in np.ndindex(size, size):
        x, y = _LEFT + column * cell, _TOP + row * cell
        draw.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), _CELL)
    x, y = _centre(goal, cell)
    draw.rounded_rectangle((x - 0.3 * cell, y - 0.3 * cell, x + 0.3 * cell, y + 0.3 * cell), 0.08 * cell, _GOAL)
    x, y = _centre(agent, cell)
    if came_from is not None:
        draw.line((*_centre(came_from, cell), x, y), _AGENT, max(round(0.06 * cell), 1))
    draw.circle((x, y), 0.24 * cell, _AGENT)
    _draw_keys(draw, moves)
    return np.asarray(image)


def _centre(place: IntArray, cell: float) -> tuple[float, float]:
    """Return the pixel in the middle of a cell."""
    return _LEFT + (int(place[1]) + 0.5) * cell, _TOP + (int(place[0]) + 0.5) * cell


def _draw_keys(draw: ImageDraw.ImageDraw, moves: IntArray) -> None:
    """Draw a box for each action with the arrow of its move."""
    font = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    text = "what each action does on this level, which the agent is not told"
    draw.text((0, _CAPTION), text, _DIM, ImageFont.truetype(font, 13), anchor="lm")
    width, (top, bottom) = SIZE / len(moves), _KEYS
    for action, move in enumerate(moves.tolist()):
        x = (action + 0.5) * width
        draw.rectangle((x - 0.45 * width, top, x + 0.45 * width, bottom), _CELL)
        draw.text((x, (top + bottom) / 2), _ARROWS[tuple(move)], _INK, ImageFont.truetype(font, 34), anchor="mm")
