"""The chart: fixed scales, nothing shown before it happens, nothing cut off."""

import numpy as np
import pytest

from srwm_rl.agents.evaluation.head_costs import HeadCost
from srwm_rl.scripts.video import canvas
from srwm_rl.scripts.video.canvas import COLOUR_MAPS, INK, paint
from srwm_rl.scripts.video.chart import Chart, Curve, Heat, Section, format_number
from srwm_rl.scripts.video.panel import head_rows, running_returns
from srwm_rl.scripts.video.scene import PROCGEN_ACTIONS

# To the lightness of OKLab, https://bottosson.github.io/posts/oklab.
TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LIGHTNESS = np.array([0.2104542553, 0.7936177850, -0.0040720468])


def colour_map(name: str) -> np.ndarray:
    """Return a colour map, `[256, 3]`."""
    return paint(np.arange(256), 0, 255, name)


def lightness_of(rgb: np.ndarray) -> np.ndarray:
    """Map sRGB bytes `[..., 3]` to the lightness of OKLab, 0 .. 1."""
    fraction = rgb / 255
    linear = np.where(fraction <= 0.04045, fraction / 12.92, ((fraction + 0.055) / 1.055) ** 2.4)
    lightness: np.ndarray = np.cbrt(linear @ TO_LMS.T) @ TO_LIGHTNESS
    return lightness


def test_lightness_of_known_colours() -> None:
    colours = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]])
    np.testing.assert_allclose(lightness_of(colours), [1, 0, 0.62796], atol=1e-5)


@pytest.mark.parametrize("name", COLOUR_MAPS)
def test_colour_maps_are_ordered_by_lightness(name: str) -> None:
    """Readers who confuse hues still see the order; the diverging map is darkest in the middle."""
    lightness = lightness_of(colour_map(name))
    steps = np.diff(lightness)
    if name == "poles":
        middle = int(lightness.argmin())
        assert 112 < middle < 143
        assert (steps[:middle] < 2e-3).all()
        assert (steps[middle:] > -2e-3).all()
        assert abs(lightness[0] - lightness[-1]) < 0.06
    else:
        assert (steps > -2e-3).all()  # rounding to bytes
        assert lightness[-1] - lightness[0] > 0.6


def test_painting_keeps_to_its_scale() -> None:
    table = colour_map("sea")
    colours = paint(np.array([-9.0, 0.0, 0.5, 1.0, 9.0]), 0.0, 1.0, "sea")
    np.testing.assert_array_equal(colours, table[[0, 0, 128, 255, 255]])
    assert (paint(np.zeros(3), 0.0, 0.0, "sea") == table[0]).all()


@pytest.mark.parametrize("text", ["a", "x" * 300, "paper6_1, core srwm, 302,400 steps", "Grüße-мир-" * 20])
@pytest.mark.parametrize("room", [40, 200, 512])
def test_texts_fit(text: str, room: int) -> None:
    fitted = canvas.fit(text, 13, room)
    assert canvas.font(13).getlength(fitted) <= room
    assert fitted == text or "..." in fitted


def test_numbers() -> None:
    assert [format_number(value) for value in (0, 1, 0.123456, -12.345, 1e-7, 123456)] == [
        "0", "1", "0.123", "-12.3", "1e-07", "1.23e+05",
    ]  # fmt: skip


def chart(n_steps: int, starts: tuple[int, ...] = (0,)) -> Chart:
    rng = np.random.default_rng(0)
    flags = np.isin(np.arange(n_steps), starts)
    values = rng.random((n_steps, 3))
    heat = Heat(values, 0.0, 1.0, "ember", ["0", "1", "2"], 60.0)
    curve = Curve(values[:, 0] + 0.5, 0.0, 2.0, INK, 40.0, bars=values[:, 1])
    return Chart((500, 300), [Section("heat", [heat], str), Section("curve", [curve])], flags)


@pytest.mark.parametrize("n_steps", [1, 7, 384, 3000])
def test_only_what_has_happened_is_shown(n_steps: int) -> None:
    drawn = chart(n_steps)
    for t in (0, n_steps // 2, n_steps - 1):
        shown = drawn.at(t)
        end = max(drawn.edges[t + 1], drawn.left + 1)
        titles = np.zeros(shown.shape[:2], bool)
        for y in drawn._title_ys:
            titles[max(y - 9, 0) : y + 9] = True  # where the present value is written
        beyond = np.zeros_like(titles)
        beyond[:, end + 1 : drawn.right] = True
        np.testing.assert_array_equal(shown[beyond & ~titles], drawn.empty[beyond & ~titles])
        np.testing.assert_array_equal(shown[:, drawn.left : end][~titles[:, drawn.left : end]],
                                      drawn.full[:, drawn.left : end][~titles[:, drawn.left : end]])  # fmt: skip
    assert drawn.edges[n_steps] == drawn.right
    assert (drawn.full != drawn.empty).any()


def test_a_cell_has_the_colour_of_its_number() -> None:
    values = np.array([[0.0, 0.25], [0.5, 1.0]])
    drawn = Chart((300, 200), [Section("", [Heat(values, 0.0, 1.0, "sea", ["a", "b"], 1.0)])], np.array([True, False]))
    (_, top, bottom), middle = drawn._plots[0], (drawn.left + drawn.right) // 2
    for t, x in enumerate((middle - 20, middle + 20)):
        for row, y in enumerate((top + 5, bottom - 5)):
            np.testing.assert_array_equal(drawn.full[y, x], paint(values[t, row : row + 1], 0.0, 1.0, "sea")[0])


def test_episode_starts_are_marked_in_every_plot() -> None:
    plain, marked = chart(50), chart(50, (0, 20))
    x = marked.edges[20]
    for _, top, bottom in marked._plots:
        assert (marked.full[top:bottom, x] == INK).all()
    assert (plain.full[:, : x - 12] == marked.full[:, : x - 12]).all()


def test_more_steps_than_pixels_are_averaged() -> None:
    values = np.arange(12, dtype=float)[:, None]
    for shown, means in ((values, [1, 4, 7, 10]), (values[:2], [0, 0, 1, 1])):
        heat = Heat(shown, 0.0, 11.0, "sea", ["a"], 1.0)
        drawn = Chart((4 + 64 + 52, 200), [Section("", [heat])], np.arange(len(shown)) == 0)
        middle = sum(drawn._plots[0][1:]) // 2
        expected = paint(np.array(means), 0.0, 11.0, "sea")
        np.testing.assert_array_equal(drawn.full[middle, drawn.left : drawn.right], expected)


def test_nothing_is_cut_off() -> None:
    """The chart's outermost pixels stay empty: no label reaches the edge."""
    small = Heat(np.zeros((9, 1)), -0.01623, 1.234e-5, "poles", ["0"], 1.0)
    with_long_numbers = Chart((300, 200), [Section("", [small])], np.arange(9) == 0)
    for drawn in (*map(chart, (1, 9, 101, 3000)), with_long_numbers):
        background = drawn.full[0, 0]
        for edge in (drawn.full[:, :2], drawn.full[:, -2:], drawn.full[-1:]):
            assert (edge == background).all()


def test_returns_begin_anew_with_each_episode() -> None:
    arrays = {"rewards": np.array([1, 2, 3, 4.0]), "starts": np.array([True, False, True, False])}
    assert running_returns(arrays).tolist() == [1, 3, 3, 7]


@pytest.mark.parametrize("name", PROCGEN_ACTIONS)
def test_every_sign_leaves_ink_within_its_place(name: str) -> None:
    drawn = canvas.Canvas((40, 40))
    drawn.text(20, 20, name, 14, INK, "m")
    ys, xs = np.nonzero((drawn.pixels() != canvas.PAPER).any(-1))
    assert len(xs) > 3
    assert min(xs.min(), ys.min()) >= 10
    assert max(xs.max(), ys.max()) <= 30


def test_dimmed_rows_are_darker_and_others_unchanged() -> None:
    values = np.linspace(0.5, 1, 40).reshape(10, 4)
    pictures = []
    for dimmed in (None, np.array([False, True, False, True])):
        heat = Heat(values, 0, 1, "ember", ["a", "b", "c", "d"], 1.0, dimmed=dimmed)
        chart = Chart((400, 200), [Section("", [heat])], np.zeros(10, bool))
        ((_, top, bottom),) = chart._plots
        rows = chart.full[top:bottom, chart.left : chart.right]
        pictures.append(rows[np.arange(4) * len(rows) // 4 + len(rows) // 8])  # the middle of each row
    plain, dim = pictures
    np.testing.assert_array_equal(plain[::2], dim[::2])
    assert (lightness_of(dim[1::2]) < lightness_of(plain[1::2]) - 0.1).all()


def test_heads_are_ranked_by_what_they_cost() -> None:
    names = ["0.0", "0.1", "1.0", "1.1"]
    by_layer = head_rows(2, 2)
    assert (by_layer.labels, [*by_layer.order], by_layer.dimmed, [*by_layer.bands]) == (names, [0, 1, 2, 3], None, [2])
    means = {(0, 0): (0.1, -0.1), (0, 1): (0.05, 0.01), (1, 0): (0.7, 0.6), (1, 1): (-0.2, -0.3)}
    costs = [HeadCost(layer, head, "a", mean, low, 1.0) for (layer, head), (mean, low) in means.items()]
    ranked = head_rows(2, 2, costs)
    assert ranked.labels == ["1.0  +0.7", "0.1  +0.05", "0.0  +0.1", "1.1  -0.2"]
    assert [*ranked.order] == [2, 1, 0, 3]
    assert ranked.dimmed is not None
    assert [*ranked.dimmed] == [False, False, True, True]
    assert [*ranked.bands] == [2]
    assert head_rows(2, 2, costs[1:]).dimmed is None, "a head is missing"
    assert head_rows(2, 3, costs).dimmed is None, "costs of another network"
