"""Lazy quantized weights: one computation for codes and scales, one tensor held."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from rotexport.errors import GraphError
from rotexport.graph.weights import Weight
from rotexport.quant.formats import INT4, WEIGHT_FORMATS
from rotexport.quant.lazy import Memo, Part, Quantization, QuantizedPart
from rotexport.quant.scales import ScaledRounding


@dataclass(frozen=True)
class Counted(Weight):
    """A weight that counts how often it is read."""

    seed: int
    reads: list = field(default_factory=list, compare=False)

    @property
    def shape(self):
        return (8, 6)

    @property
    def dtype(self):
        return np.dtype(np.float32)

    def read(self):
        self.reads.append(self.seed)
        return np.random.default_rng(self.seed).standard_normal(self.shape).astype(np.float32)


def quantization(source, memo, **options):
    options = {"format": WEIGHT_FORMATS["int4"], "group": 4, "search": False, **options}
    return Quantization(source, ScaledRounding(**options), memo)


def parts(made):
    return QuantizedPart(made, Part.CODES, (8, 6)), QuantizedPart(made, Part.SCALES, (2, 6))


def test_codes_and_scales_share_one_computation():
    source = Counted(0)
    codes, scales = parts(quantization(source, Memo()))
    expected = ScaledRounding(WEIGHT_FORMATS["int4"], 4, search=False).quantize(Counted(0).read())
    assert np.array_equal(codes.read(), expected.codes)
    assert np.array_equal(scales.read(), expected.scales)
    assert source.reads == [0]
    assert codes.dtype == INT4
    assert codes.nbytes == 24


def test_only_the_last_weight_is_held():
    memo = Memo()
    first, second = Counted(1), Counted(2)
    first_codes, _ = parts(quantization(first, memo))
    second_codes, _ = parts(quantization(second, memo))
    first_codes.read()
    second_codes.read()
    first_codes.read()
    assert (first.reads, second.reads) == ([1, 1], [2])


def test_nothing_is_read_before_it_is_asked_for():
    source = Counted(0)
    codes, scales = parts(quantization(source, Memo()))
    assert (codes.shape, scales.shape, scales.nbytes) == ((8, 6), (2, 6), 48)
    assert source.reads == []


def test_equal_expressions_are_equal_weights():
    one, other = parts(quantization(Counted(0), Memo())), parts(quantization(Counted(0), Memo()))
    assert one == other
    assert hash(one) == hash(other)
    assert one[0] != parts(quantization(Counted(1), Memo()))[0]
    assert one[0] != parts(quantization(Counted(0), Memo(), search=True))[0]
    assert one[0] != replace(one[0], viewed=(2, 4, 6))


def test_codes_can_be_viewed_per_group():
    made = quantization(Counted(0), Memo())
    grouped = QuantizedPart(made, Part.CODES, (2, 4, 6)).read()
    assert np.array_equal(grouped[1], parts(made)[0].read()[4:])


def test_a_quantizer_without_factors_says_so():
    made = quantization(Counted(0), Memo())
    with pytest.raises(GraphError, match="factors"):
        QuantizedPart(made, Part.FACTORS, (2, 6)).read()
