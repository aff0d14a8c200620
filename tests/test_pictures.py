"""pictures.py: ticks are round and cover the axis, a point lands on its pixel, and nothing is drawn outside of the box."""
import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st
from PIL import ImageColor
from refusals import refusal

from pictures import COLOURS, Chart, faint, log_ticks, number, spread, table, text_width, ticks

RED = "#ff0000"
finite = st.floats(-1e6, 1e6)


def redness(picture):
    """How red each pixel is, 0 to 255: the marks of a test are the only colour."""
    picture = picture.astype(int)
    return picture[..., 0] - picture[..., 1]


def centre(picture):
    """(x, y) of the centre of what is red, in pixels from the left upper corner of the picture."""
    weights = redness(picture).clip(0)
    rows, columns = np.indices(weights.shape)
    return (((columns + 0.5) * weights).sum() / weights.sum(), ((rows + 0.5) * weights).sum() / weights.sum())


# Ticks

@given(low=finite, width=st.floats(1e-3, 1e6), count=st.integers(2, 10))
def test_ticks_are_round_evenly_apart_and_cover_the_axis(low, width, count):
    high = low + width
    found = np.array(ticks(low, high, count))
    slack = 1e-6 * width
    assert low - slack <= found.min() and found.max() <= high + slack and count <= len(found) <= 2.5 * count + 1
    step = found[1] - found[0]
    mantissa = step / 10.0 ** math.floor(math.log10(step * (1 + 1e-6)))
    assert np.allclose(np.diff(found), step, rtol=1e-6) and min(abs(mantissa - nice) for nice in (1, 2, 5)) < 1e-4
    assert found[0] - low < step + slack and high - found[-1] < step + slack         # none is left out


def test_a_tick_at_either_end_is_kept_and_0_is_0():
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and ticks(-0.3, 0.3, 6)[3] == 0.0
    assert ticks(0, 1000, 3) == [0, 500, 1000] and ticks(-2.6, 2.6, 3) == [-2, 0, 2]


@given(low=st.floats(1e-9, 1e6), ratio=st.floats(1.5, 1e12), count=st.integers(2, 5))
def test_logarithmic_ticks_are_round_few_and_cover_the_axis(low, ratio, count):
    high = low * ratio
    found = np.array(log_ticks(low, high, count))
    assert 2 <= len(found) <= 2.5 * count + 1 and low * (1 - 1e-6) <= found[0] and found[-1] <= high * (1 + 1e-6)
    places = np.log(np.concatenate([[low], found, [high]]) / low) / math.log(ratio)
    assert ratio < 100 or np.diff(places).max() < 0.6
    assert all(abs(float(f"{value:.0e}") / value - 1) < 1e-6 for value in found) or ratio < 10       # one digit and zeros


def test_logarithmic_ticks_are_powers_of_ten_where_there_are_enough():
    assert log_ticks(0.5, 2e4) == pytest.approx([1, 10, 100, 1000, 10_000])
    assert log_ticks(0.04, 0.6) == pytest.approx([0.05, 0.1, 0.2, 0.5])
    assert log_ticks(1e-12, 2, 3) == pytest.approx([1e-12, 1e-9, 1e-6, 1e-3, 1])


@given(mantissa=st.sampled_from([1, 2, 5, 2.5]), exponent=st.integers(-12, 12), sign=st.sampled_from([1, -1]))
def test_a_number_reads_back_as_itself_and_is_short(mantissa, exponent, sign):
    value = sign * mantissa * 10.0 ** exponent
    text = number(value)
    assume(not (text.startswith("10^") and sign < 0))
    back = 10.0 ** int(text[3:]) if text.startswith("10^") else float(text)
    assert back == pytest.approx(value, rel=1e-9) and len(text) <= 9 and text.isascii()


def test_numbers_are_written_as_one_writes_them():
    assert [number(value) for value in (0, 0.05, 1, 2000, 1e-5, 2e-5, 1e9, 5e7)] == [
        "0", "0.05", "1", "2000", "10^-5", "2e-5", "10^9", "5e7"]


@given(values=st.lists(finite, min_size=1, max_size=5))
def test_the_range_holds_all_values_with_room_at_both_ends(values):
    low, high = spread([*values, math.nan, math.inf], [])
    assert low < min(values) <= max(values) < high or max(values) - min(values) < 1e-9 * abs(max(values))


@given(values=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5))
def test_the_logarithmic_range_holds_all_values_above_0(values):
    low, high = spread([*values, -1.0, 0.0, math.nan], log=True)
    assert 0 < low < min(values) <= max(values) < high or max(values) / min(values) < 1 + 1e-9


@pytest.mark.parametrize("values, log", [([], False), ([math.nan, math.inf], False), ([0.0, -1.0], True)])
def test_a_range_of_nothing_is_refused(values, log):
    refusal(lambda: spread(values, log=log), "nothing to draw")


# Marks

@given(x=st.floats(-0.9, 2.9), y=st.floats(10.5, 19.5), log_x=st.booleans(), log_y=st.booleans())
def test_a_point_lands_on_its_pixel(x, y, log_x, log_y):
    x = math.exp(x) if log_x else x
    ends = (math.exp(-1), math.exp(3)) if log_x else (-1, 3)
    chart = Chart(ends, (10, 20), "title", "x", "y", 300, 200, log_x=log_x, log_y=log_y)
    chart.points([x], [y], RED, 3)
    left, top, right, bottom = chart.box
    share = ((math.log(x) if log_x else x) + 1) / 4                      # of the way through the box
    height = math.log2(y / 10) if log_y else (y - 10) / 10
    found = centre(chart.image())
    assert abs(found[0] - (left + share * (right - left))) < 0.7 and abs(found[1] - (bottom - height * (bottom - top))) < 0.7


def test_a_tick_stands_below_its_own_grid_line():
    chart = Chart((0, 10), (0, 1), width=300, height=200)
    picture = chart.image()
    left, _, right, bottom = chart.box
    for value in chart.x_ticks[1:-1]:
        x = round(left + value / 10 * (right - left))
        assert picture[bottom + 3, x - 1:x + 2].min() < 150 and picture[bottom + 3, x + 6].min() == 255
        assert picture[bottom - 20, x - 1:x + 2].min() < 250


@pytest.mark.parametrize("y", [[-1000, 1000], [0.5, math.inf], [1e300, -1e300], [math.nan, 0.5]])
def test_what_leaves_the_box_is_cut_off_at_its_edges(y):
    plain, chart = (Chart((0, 1), (0, 1), width=200, height=150) for _ in range(2))
    chart.line([0, 1], y, RED, 5)
    chart.line([-50, 50], [0.5, 0.5], RED, 5)
    chart.points([-0.01, 1.01, 0.5], [0.5, 0.5, 1.02], RED, 9)
    left, top, right, bottom = chart.box
    before, after = plain.image(), chart.image()
    inside = np.zeros(before.shape[:2], bool)
    inside[top - 1:bottom + 1, left - 1:right + 1] = True                # the axes' own lines may be mixed with a mark
    assert (redness(after) > 100).sum() > 300 and np.array_equal(before[~inside], after[~inside])


def test_a_line_without_a_place_on_a_logarithmic_axis_joins_the_rest():
    chart, same = (Chart((0, 4), (0.1, 10), width=200, height=150, log_y=True) for _ in range(2))
    chart.line([0, 1, 2, 3, 4], [1, 0, 2, -1, 3], RED)
    same.line([0, 2, 4], [1, 2, 3], RED)
    assert np.array_equal(chart.image(), same.image())


def test_edges_are_smooth():
    chart = Chart((0, 1), (0, 1), width=200, height=150)
    chart.line([0, 1], [0, 1], RED)
    shades = np.unique(redness(chart.image()))
    assert ((shades > 20) & (shades < 235)).sum() >= 3


@given(angle=st.floats(0, 2 * math.pi))
def test_an_arrow_is_a_thin_line_and_wide_only_shortly_before_its_tip(angle):
    chart = Chart((-1, 1), (-1, 1), width=300, height=300)
    chart.arrows([0], [0], [0.5 * math.cos(angle)], [0.5 * math.sin(angle)], RED)
    tail, tip = chart.pixels([0, 0.5 * math.cos(angle)], [0, 0.5 * math.sin(angle)])
    length = np.linalg.norm(tip - tail)
    rows, columns = np.nonzero(redness(chart.image()) > 60)
    places = np.stack([columns + 0.5, rows + 0.5], axis=1) - tail
    along, across = places @ (tip - tail) / length, np.abs(places @ np.array([tail[1] - tip[1], tip[0] - tail[0]])) / length
    assert -1.5 < along.min() < 1.5 and abs(along.max() - length) < 1.5
    assert across[along < length - 7].max() < 1.6 and across[along >= length - 7].max() > 2


def test_arrows_to_nowhere_are_left_out():
    chart, same = (Chart((-1, 1), (-1, 1), width=200, height=200) for _ in range(2))
    chart.arrows([0, 0.5, math.nan], [0, 0.5, 0], [0.3, math.nan, 0.1], [0.2, 0, 0.1], RED)
    same.arrows([0], [0], [0.3], [0.2], RED)
    assert np.array_equal(chart.image(), same.image()) and np.array_equal(chart.image(), chart.image())


@pytest.mark.parametrize("x, y", [(0.9, 0.9), (0.1, 0.9), (0.9, 0.1)])
def test_the_legend_keeps_clear_of_the_marks(x, y):
    chart, without = (Chart((0, 1), (0, 1), width=500, height=400) for _ in range(2))
    for one, label in ((chart, "some run"), (without, None)):
        one.points(np.full(9, x), np.linspace(y - 0.1, y + 0.1, 9), RED, 8, label=label)
    added = redness(chart.image()) - redness(without.image())
    assert added.min() == 0 and added.max() > 200                        # no mark is hidden, and the legend's own is there
    assert np.array_equal(chart.image(), chart.image())


def test_a_range_that_is_none_is_refused():
    for ends, log in (((1, 1), False), ((2, 1), False), ((0, 1), True), ((math.nan, 1), False), ((0, math.inf), False)):
        refusal(lambda: Chart(ends, (0, 1), log_x=log), "an axis from")
        refusal(lambda: Chart((0, 1), ends, log_y=log), "an axis from")


# Text and colours

def test_what_is_raised_is_smaller_and_higher():
    chart = Chart((0, 1), (0, 1), width=300, height=300)
    chart.text(0.5, 0.5, "10^8", RED)
    flat = Chart((0, 1), (0, 1), width=300, height=300)
    flat.text(0.5, 0.5, "108", RED)
    assert centre(chart.image())[1] < centre(flat.image())[1] - 0.5 and text_width("10^8", 20) < text_width("108", 20)


def test_names_of_marks_do_not_hide_each_other():
    """Each takes another side of the mark, where there is room, so that all are seen whole."""
    def ink(x, times):
        chart = Chart((0, 1), (0, 1), width=300, height=300)
        for _ in range(times):
            chart.text(x, 0.5, "name", RED)
        return (255.0 - chart.image()).sum() - (255.0 - Chart((0, 1), (0, 1), width=300, height=300).image()).sum()
    for x, sides in ((0.5, 4), (0.0, 1), (1.0, 1)):
        assert ink(x, sides) == pytest.approx(sides * ink(0.5, 1), rel=0.1)


PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]


@pytest.mark.parametrize("sight", [np.eye(3), PROTANOPIA, DEUTERANOPIA], ids=["all", "no red", "no green"])
def test_the_colours_differ_also_for_the_colour_blind_and_from_the_paper(sight):
    """The matrices are of Machado et al. 2009, on linear light."""
    rgb = np.array([ImageColor.getrgb(colour) for colour in (*COLOURS, "white")]) / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    seen = (linear @ np.transpose(sight)).clip(0, 1) ** (1 / 2.2)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.15


def test_a_faint_colour_is_between_the_colour_and_white():
    for colour in COLOURS:
        assert all(full <= pale < 255 or full == 255 for full, pale in zip(ImageColor.getrgb(colour), faint(colour)))
        assert sum(faint(colour)) > sum(ImageColor.getrgb(colour)) + 100


# Tables

@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [(8, 8), (64, 70), (100, 90)])
def test_a_table_shows_every_image_whole_in_its_row_and_column(side, channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, *side, channels), dtype=np.uint8)
    picture = table(images, ("first", "second"), ("a", "b", "c"), "corner")
    zoom = {8: 12, 64: 2, 100: 1}[side[0]]                               # to 96 pixels at least
    shown = np.broadcast_to(images, (*images.shape[:4], 3)).repeat(zoom, axis=2).repeat(zoom, axis=3)
    height, width = shown.shape[2:4]
    left, top = picture.shape[1] - 8 - 3 * (width + 4), 40
    for r, k in itertools.product(range(2), range(3)):
        y, x = top + r * (height + 4), left + k * (width + 4)
        assert np.array_equal(picture[y:y + height, x:x + width], shown[r, k])
    assert picture[:top, left:].min() < 120 and picture[top:, :left].min() < 120     # what is written


def test_long_names_of_columns_do_not_run_into_each_other():
    images = np.full((1, 3, 96, 96, 1), 255, np.uint8)
    picture = table(images, ("row",), ["a name much longer than the column"] * 3)
    left = picture.shape[1] - 8 - 3 * 100
    written = (picture[:40] < 200).any(axis=(0, 2))
    assert all(written[left + 100 * k:left + 100 * k + 96].any() and not written[left + 100 * k + 96:left + 100 * k + 100].any()
               for k in range(3))
