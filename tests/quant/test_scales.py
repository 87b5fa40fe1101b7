"""Weight quantizers, against loops in float64 and dense searches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotexport.quant import scales
from rotexport.quant.formats import WEIGHT_FORMATS, weight_format
from rotexport.quant.scales import AsymmetricRounding, ScaledRounding

FORMATS = sorted(WEIGHT_FORMATS)


def gaussian(inputs, outputs, seed=0):
    return np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)


def quantized(weight, name, group, *, search=False, two_level=False):
    return ScaledRounding(WEIGHT_FORMATS[name], group, search, two_level).quantize(weight)


def dequantized(result):
    values = result.codes.astype(np.float32)
    if result.zeros is not None:
        values -= np.repeat(result.zeros.astype(np.float32), len(values) // len(result.zeros), axis=0)
    scales = result.scales if result.factors is None else result.scales * result.factors
    return values * np.repeat(scales, len(values) // len(scales), axis=0)


def squared_error(result, weight):
    return float(((dequantized(result) - weight) ** 2).sum())


@st.composite
def shapes(draw):
    """Odd shapes: (groups, group, outputs)."""
    return draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 7))


@settings(deadline=None, max_examples=25)
@given(shape=shapes(), name=st.sampled_from(["int8", "int4"]), seed=st.integers(0, 99))
def test_round_to_nearest_equals_a_loop(shape, name, seed):
    groups, group, outputs = shape
    weight = gaussian(groups * group, outputs, seed)
    result = quantized(weight, name, group)
    number_format = WEIGHT_FORMATS[name]
    for n in range(outputs):
        for g in range(groups):
            part = slice(g * group, (g + 1) * group)
            scale = np.float32(max(abs(float(w)) for w in weight[part, n]) / number_format.highest)
            assert result.scales[g, n] == pytest.approx(scale, rel=1e-6)
            for code, w in zip(result.codes[part, n].astype(int), weight[part, n], strict=True):
                # Ties may fall either way in float32: the distance decides.
                assert abs(code - float(w) / float(scale)) <= 0.5 + 1e-4


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("two_level", [False, True])
def test_shapes_and_types(name, two_level):
    result = quantized(gaussian(12, 5), name, 4, two_level=two_level)
    assert result.codes.shape == (12, 5)
    assert result.codes.dtype == WEIGHT_FORMATS[name].storage
    assert result.scales.shape == ((1, 5) if two_level else (3, 5))
    assert result.scales.dtype == np.float32
    assert (result.factors is not None) == two_level


@settings(deadline=None, max_examples=25)
@given(shape=shapes(), name=st.sampled_from(FORMATS), seed=st.integers(0, 99))
def test_the_search_is_never_worse_than_rounding(shape, name, seed):
    groups, group, outputs = shape
    weight = np.random.default_rng(seed).standard_t(3, (groups * group, outputs)).astype(np.float32)
    plain = squared_error(quantized(weight, name, group), weight)
    searched = squared_error(quantized(weight, name, group, search=True), weight)
    assert searched <= plain * (1 + 1e-5) + 1e-12


def test_the_search_comes_near_a_dense_search():
    weight = gaussian(64, 40)
    searched = squared_error(quantized(weight, "int4", 64, search=True), weight)
    widest = np.abs(weight).max(axis=0) / 7
    errors = []
    for clip in np.linspace(0.3, 1.2, 500):
        scale = (widest * clip).astype(np.float64)
        codes = np.clip(np.rint(weight / scale), -8, 7)
        errors.append(((codes * scale - weight) ** 2).sum(axis=0))
    # 12 ranges with the best scale of each, against 500 ranges: within 3 %.
    assert searched <= 1.03 * float(np.min(errors, axis=0).sum())


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("kind", [ScaledRounding, AsymmetricRounding])
def test_two_level_factors_keep_products_in_int8(kind, search):
    weight = gaussian(256, 30) * np.exp(np.random.default_rng(1).standard_normal((256, 1))).astype(np.float32)
    result = kind(WEIGHT_FORMATS["int4"], 16, search, two_level=True).quantize(weight)
    assert result.factors is not None
    assert np.array_equal(result.factors, np.rint(result.factors))
    assert result.factors.min() >= 1
    assert 14 <= result.factors.max() <= 15
    codes = result.codes.astype(int)
    if result.zeros is not None:
        assert np.array_equal(result.offsets, -result.zeros.astype(int) * result.factors)
        codes -= np.repeat(result.zeros.astype(int), 16, axis=0)
    assert np.abs(codes * np.repeat(result.factors, 16, axis=0)).max() <= 127


@pytest.mark.parametrize("kind", [ScaledRounding, AsymmetricRounding])
def test_two_level_scales_cost_little_error_on_normal_weights(kind):
    weight = gaussian(576, 64)
    free, two_level = (
        kind(WEIGHT_FORMATS["int4"], 64, search=True, two_level=wanted).quantize(weight)
        for wanted in (False, True)
    )
    errors = [squared_error(result, weight) for result in (free, two_level)]
    assert errors[0] < errors[1] < 1.06 * errors[0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1e30])
def test_extreme_columns_stay_finite(name, search, two_level, size):
    weight = gaussian(8, 3)
    weight[:, 1] = size
    result = quantized(weight, name, 4, search=search, two_level=two_level)
    values = dequantized(result)
    assert np.isfinite(values).all()
    assert (result.scales > 0).all()
    vanishing = 448 * scales.SMALLEST_SCALE  # what rounds to zero because its scale would vanish in fp16
    assert np.allclose(values[:, 1], size, rtol=0.1, atol=vanishing)


def test_the_result_does_not_depend_on_the_chunks(monkeypatch):
    weight = gaussian(24, 37)
    whole = quantized(weight, "int4", 8, search=True)
    monkeypatch.setattr(scales, "CHUNK_ELEMENTS", 24 * 5)
    pieces = quantized(weight, "int4", 8, search=True)
    assert np.array_equal(whole.codes, pieces.codes)
    assert np.array_equal(whole.scales, pieces.scales)


def asymmetric(weight, name, group, *, search=False):
    return AsymmetricRounding(weight_format(name, symmetric=False), group, search).quantize(weight)


def offset_values(result):
    """Return (codes - zeros) * scales in float64."""
    group = len(result.codes) // len(result.scales)
    steps = result.codes.astype(np.float64) - np.repeat(result.zeros.astype(np.float64), group, axis=0)
    return steps * np.repeat(result.scales, group, axis=0).astype(np.float64)


@settings(deadline=None, max_examples=25)
@given(
    shape=shapes(),
    name=st.sampled_from(["int8", "int4"]),
    shift=st.sampled_from([-2.0, 0.0, 0.5, 5.0]),
    seed=st.integers(0, 99),
)
def test_asymmetric_rounding_equals_a_loop(shape, name, shift, seed):
    groups, group, outputs = shape
    weight = gaussian(groups * group, outputs, seed) + np.float32(shift)
    result = asymmetric(weight, name, group)
    lowest, highest = {"int8": (-128, 127), "int4": (-8, 7)}[name]
    for n in range(outputs):
        for g in range(groups):
            part = slice(g * group, (g + 1) * group)
            least, most = min(0.0, weight[part, n].min()), max(0.0, weight[part, n].max())
            scale = (float(most) - float(least)) / (highest - lowest)
            assert result.scales[g, n] == pytest.approx(scale, rel=1e-6)
            zero = int(result.zeros[g, n])
            assert abs(zero - (lowest - float(least) / scale)) <= 0.5 + 1e-3
            for code, w in zip(result.codes[part, n].astype(int), weight[part, n], strict=True):
                nearest = min(max(float(w) / scale, lowest - zero), highest - zero)
                assert abs(code - zero - nearest) <= 0.5 + 1e-3


def test_zero_points_help_where_weights_lean_to_one_side():
    weight = gaussian(64, 40) + np.float32(1.5)
    for search in (False, True):
        offset = float(((offset_values(asymmetric(weight, "int4", 16, search=search)) - weight) ** 2).sum())
        assert offset < 0.5 * squared_error(quantized(weight, "int4", 16, search=search), weight)


@settings(deadline=None, max_examples=25)
@given(shape=shapes(), name=st.sampled_from(["int8", "int4"]), seed=st.integers(0, 99))
def test_the_asymmetric_search_is_never_worse_than_rounding(shape, name, seed):
    groups, group, outputs = shape
    weight = np.random.default_rng(seed).standard_t(3, (groups * group, outputs)).astype(np.float32)
    errors = [
        float(((offset_values(asymmetric(weight, name, group, search=search)) - weight) ** 2).sum())
        for search in (False, True)
    ]
    assert errors[1] <= errors[0] * (1 + 1e-5) + 1e-10


def test_asymmetric_groups_of_zeros_stay_zero():
    weight = gaussian(8, 3)
    weight[:4, 1] = 0
    result = asymmetric(weight, "int4", 4, search=True)
    assert (offset_values(result)[:4, 1] == 0).all()
    assert np.isfinite(result.scales).all() and (result.scales > 0).all()
    assert result.zeros.dtype == result.codes.dtype == weight_format("int4").storage
