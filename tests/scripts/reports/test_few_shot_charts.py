"""The names beside the lines of few-shot charts."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from srwm_rl.scripts.reports.few_shot_charts import LINE_HEIGHT, _name_ends


@pytest.mark.parametrize("ends", [(98.0, 98.1, 95.0, 94.9), (99.0, 20.0, 5.0), (100.0, 99.0, 2.0, 1.0)])
def test_names_are_apart_and_below_the_title(ends: tuple[float, ...]) -> None:
    axes = Figure().add_subplot()
    _name_ends(axes, {f"line {i}": (end, "black") for i, end in enumerate(ends)})
    heights = sorted(text.xy[1] for text in axes.texts)
    assert np.diff(heights).min() > LINE_HEIGHT - 1e-6
    assert heights[-1] <= 100
