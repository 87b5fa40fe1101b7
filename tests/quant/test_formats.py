"""Rounding onto number formats, against a search over every code."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotexport.errors import RecipeError
from rotexport.quant.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS, activation_format, weight_format

FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
GRIDS = {
    ("weight", "int8"): np.arange(-127, 128),
    ("weight", "int4"): np.arange(-8, 8),
    ("weight", "fp8"): FP8_VALUES[np.isfinite(FP8_VALUES)],
    ("activation", "int8"): np.arange(-128, 128),
    ("activation", "int4"): np.arange(-7, 8),
    ("activation", "fp8"): FP8_VALUES[np.isfinite(FP8_VALUES)],
}


def format_of(kind, name):
    return (weight_format if kind == "weight" else activation_format)(name)


@pytest.mark.parametrize(("kind", "name"), GRIDS)
@given(values=st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=50))
def test_rounding_takes_a_nearest_code(kind, name, values):
    x = np.array(values, np.float32)
    codes = format_of(kind, name).round(x)
    grid = GRIDS[kind, name].astype(np.float64)
    distance = np.abs(grid - x.astype(np.float64)[:, None]).min(axis=1)
    assert np.isin(codes, grid).all()
    assert np.array_equal(np.abs(codes.astype(np.float64) - x), distance)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_ties_go_to_even_codes(name):
    number_format = WEIGHT_FORMATS[name]
    assert number_format.round(np.array([0.5, 1.5, 2.5, -0.5, -1.5])).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("table", [WEIGHT_FORMATS, ACTIVATION_FORMATS])
def test_every_code_fits_its_storage(table):
    for number_format in table.values():
        ends = np.array([number_format.lowest, number_format.highest])
        assert np.array_equal(ends.astype(number_format.storage).astype(np.float64), ends)


def test_rounding_leaves_its_argument_alone():
    x = np.array([0.4, 300.0])
    WEIGHT_FORMATS["int8"].round(x)
    assert x.tolist() == [0.4, 300.0]


def test_fake_quantization_is_rounding_to_multiples_of_the_scale():
    assert np.allclose(WEIGHT_FORMATS["int4"].fake_quantize(np.array([0.26, -9.0]), 0.5), [0.5, -4.0])


def test_an_unknown_format_is_named():
    with pytest.raises(RecipeError, match="'int3'"):
        weight_format("int3")
