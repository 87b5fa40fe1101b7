"""Records as JSON and back."""

import json
import math
from dataclasses import dataclass
from enum import Enum

import pytest

from rotexport.report.serialize import from_plain, to_plain


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    value: float
    label: str | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner
    many: tuple[Inner, ...]
    names: dict[str, int]
    colour: Colour
    maybe: Inner | None = None


VALUE = Outer(Inner(1.5, "a"), (Inner(2.0), Inner(3.0)), {"x": 1}, Colour.RED)


@pytest.mark.parametrize("maybe", [None, Inner(4.0)])
def test_nested_records_survive(maybe):
    value = Outer(VALUE.inner, VALUE.many, VALUE.names, VALUE.colour, maybe)
    assert from_plain(Outer, json.loads(json.dumps(to_plain(value)))) == value


def test_whole_numbers_are_read_as_floats_where_floats_are_meant():
    assert isinstance(from_plain(Inner, {"value": 2, "label": None}).value, float)


def test_what_json_cannot_hold_becomes_null_and_nan():
    plain = to_plain(Inner(math.inf))
    assert plain["value"] is None
    assert math.isnan(from_plain(Inner, plain).value)


@pytest.mark.parametrize(
    ("data", "error"),
    [({"value": "1"}, TypeError), ({}, KeyError), ({"value": 1.0, "label": 3}, TypeError)],
)
def test_other_data_are_refused(data, error):
    with pytest.raises(error):
        from_plain(Inner, {"label": None, **data} if error is TypeError else data)


def test_an_unknown_enum_value_is_refused():
    with pytest.raises(ValueError, match="blue"):
        from_plain(Outer, {**to_plain(VALUE), "colour": "blue"})
