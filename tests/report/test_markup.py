"""Numbers and tables of the report page."""

import pytest

from rotexport.metrics import EQUAL_DB
from rotexport.report import markup


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (21.4905, "21.49"),
        (0, "0"),
        (1234.5, "1,234"),
        (1e-7, "1.00e-07"),
        (2.5e8, "2.50e+08"),
        (None, ""),
        (float("nan"), "–"),
    ],
)
def test_figures_have_about_four_digits(value, text):
    assert markup.figure(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(812, "812 B"), (1_240_000, "1.2 MB"), (163_400_000, "163 MB"), (2.14e9, "2.1 GB")]
)
def test_sizes(count, text):
    assert markup.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (99.9, "99.9 s"), (143.2, "143 s"), (1200, "20 min")]
)
def test_durations(seconds, text):
    assert markup.duration(seconds) == text


def test_decibels_of_equal_tensors_are_said_in_words():
    assert markup.decibels(EQUAL_DB) == "equal"
    assert markup.decibels(117.69) == "117.7 dB"


def test_counts_and_lists():
    assert (markup.count(1, "engine"), markup.count(2, "engine")) == ("1 engine", "2 engines")
    assert (markup.parameters(134_515_008), markup.parameters(8_030_000_000)) == (
        "134.5 million",
        "8.03 billion",
    )
    assert markup.some(["a", "b"]) == "a; b"


def test_columns_of_numbers_are_aligned_to_the_right():
    html = markup.table(["name", "error", "size"], [["<a>", "1.5e-07", "12 MB"], ["b", "", "n/a"]])
    assert "<th>name</th><th class=number>error</th><th>size</th>" in html
    assert "<th class=number>SQNR</th>" in markup.table(["SQNR"], [["equal"], ["12.0 dB"]])
    assert "<td>&lt;a&gt;</td><td class=number>1.5e-07</td>" in html
