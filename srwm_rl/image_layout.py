"""Whether an image has its channels first or last."""

from __future__ import annotations

from collections.abc import Sequence


def is_channels_first(shape: Sequence[int]) -> bool:
    """Return whether an image's shape is `(C, h, w)`; else it is `(h, w, C)`.

    Two equal neighbouring sizes are height and width, the first two if all are equal: one-hot images may have more
    channels than pixels in a row. Where none are, channels come first if the first size is the smallest, as in SB3.
    """
    first, second, third = shape
    if second in (first, third):
        return first != second
    return first <= third and first < second
