"""Charts: where things are drawn, read back from the SVG."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotexport.report.charts import BOTTOM, LEFT, RIGHT, TOP, Axes, Bar, Series, bar_chart, legend, line_chart

WIDTH, HEIGHT = 400, 200


def parsed(svg):
    return ElementTree.fromstring(svg)


def polyline(svg):
    points = parsed(svg).find("./g/polyline").get("points")
    return [tuple(map(float, point.split(","))) for point in points.split()]


def tick_labels(svg):
    return [text.text for text in parsed(svg).findall("./text") if text.get("class") == "tick"]


def chart(points, **axes):
    return line_chart([Series("a", "after", points)], Axes("block", "dB", **axes), WIDTH, HEIGHT)


def test_points_span_the_plot_and_higher_values_are_higher():
    (x0, y0), (x1, y1) = polyline(chart([(0, 0), (10, 40)]))
    assert (x0, x1) == (LEFT, WIDTH - RIGHT)
    assert (y0, y1) == (HEIGHT - BOTTOM, TOP)


def test_a_logarithmic_axis_puts_the_mean_of_the_exponents_in_the_middle():
    (_, low), (_, middle), (_, high) = polyline(chart([(0, 1), (1, 100), (2, 10000)], log_y=True))
    assert middle == pytest.approx((low + high) / 2, abs=0.1)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
    st.booleans(),
)
def test_everything_stays_inside_whatever_the_values(values, log):
    values = [abs(value) + 1e-3 for value in values] if log else values
    svg = chart(list(enumerate(values)), log_y=log)
    for x, y in polyline(svg):
        assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1


def test_ticks_are_round_numbers():
    assert tick_labels(chart([(0, 3), (29, 34)]))[:4] == ["0", "10", "20", "30"]
    assert tick_labels(chart([(0, 1.7), (29, 38)], log_y=True))[:6] == ["1", "2", "5", "10", "20", "50"]


def test_the_floor_is_visible_though_all_values_are_above_it():
    svg = chart([(0, 30), (1, 35)], floor=10.0)
    line = parsed(svg).find("./line[@class='floor']")
    assert TOP < float(line.get("y1")) <= HEIGHT - BOTTOM
    assert parsed(chart([(0, 30), (1, 35)])).find("./line[@class='floor']") is None


def test_points_tell_their_values():
    assert "block 1, a: 35" in chart([(0, 30), (1, 35)])


def test_bars_are_proportional():
    svg = bar_chart([Bar("export", 10.0, "10 s"), Bar("a & b", 5.0, "5 s"), Bar("none", 0.0, "0 s")])
    widths = [float(rect.get("width")) for rect in parsed(svg).findall("rect")]
    assert widths[1] == pytest.approx(widths[0] / 2, abs=0.1)
    assert widths[2] == 1.0


def test_bars_of_nothing_can_be_drawn():
    assert len(parsed(bar_chart([Bar("open", 0.0, "0.0 s")])).findall("rect")) == 1


def test_the_legend_names_every_line():
    text = legend([Series("before", "before", []), Series("<after>", "after", [])])
    assert re.findall(r"</span>([^<]+)</span>", text) == ["before", "&lt;after&gt;"]
