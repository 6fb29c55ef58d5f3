"""Charts of a page as SVG."""

import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pages are drawn with matplotlib")

from srwm_rl.scripts.reports.charts import Charts, short_number
from srwm_rl.scripts.reports.curves import Band, Curve, combine

STEPS = np.linspace(0, 1e6, 50)
BAND = combine([Curve(STEPS, np.sqrt(STEPS)), Curve(STEPS, STEPS / 1e3)])
FALLING = np.linspace(1, 0, 5).tolist()
PROFILE = {"fractions": FALLING, "low": FALLING, "high": FALLING}
KNOWN = {"mean": 500.0, "low": 400.0, "high": 600.0}
UNKNOWN = {"mean": 1.0, "low": None, "high": None}
NAME = '<b>$\\frac{a$ & "x"</b>'
DRAWN: list[Callable[[Charts], str]] = [
    lambda draw: draw.curve(BAND, NAME, "return", (1e6, KNOWN), random=100.0),
    lambda draw: draw.curve(Band(Curve(STEPS[:1], STEPS[:1]), STEPS[:1], STEPS[:1], []), NAME, "return"),
    lambda draw: draw.curve(BAND, NAME, "return", (1e6, UNKNOWN)),
    lambda draw: draw.curve(BAND, NAME, "return", test=Curve(STEPS, STEPS / 2e3)),
    lambda draw: draw.lines({"a": BAND.mean, "b": BAND.mean}, NAME),
    lambda draw: draw.lines({"a": BAND.mean}, NAME),
    lambda draw: draw.intervals({NAME: KNOWN, "b": UNKNOWN}, "difference"),
    lambda draw: draw.profiles(FALLING, {NAME: PROFILE, "b": PROFILE}, "return"),
]


@pytest.mark.parametrize("draw", DRAWN)
def test_a_picture_is_one_svg_with_its_names_as_text(draw: Callable[[Charts], str]) -> None:
    svg = str(draw(Charts()))
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert NAME in [text for element in root.iter("text") for text in element.itertext()]
    assert NAME in root.attrib["aria-label"]
    assert "<style" not in svg  # it would hold for the whole page
    assert "font-family" not in svg


def test_ids_of_two_pictures_differ_and_are_all_referred_to() -> None:
    pictures = Charts()
    svgs = [str(draw(pictures)) for draw in DRAWN]
    ids = [re.findall(r' id="([^"]+)"', svg) for svg in svgs]
    names = [name for ids_of_chart in ids for name in ids_of_chart]
    assert len(set(names)) == len(names) > 5
    for svg, ids_of_chart in zip(svgs, ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg)) == set(ids_of_chart)


def test_the_same_data_give_the_same_picture() -> None:
    assert DRAWN[0](Charts()) == DRAWN[0](Charts())


NUMBERS = [(0, "0"), (0.25, "0.25"), (500, "500"), (50_400, "50.4k"), (25e6, "25M"), (-2e3, "-2k"), (3e9, "3G")]


@pytest.mark.parametrize(("value", "text"), NUMBERS)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text
