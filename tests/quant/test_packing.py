"""Packed weights hold the codes they were made from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotexport.errors import GraphError
from rotexport.graph.weights import InMemory
from rotexport.quant.formats import weight_format
from rotexport.quant.lazy import Memo, Quantization
from rotexport.quant.packing import PackedRows, pack_rows, unpack_rows
from rotexport.quant.scales import ScaledRounding

RANGE = {8: (-128, 127), 4: (-8, 7)}


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([4, 8]), inputs=st.integers(1, 70), outputs=st.integers(1, 9),
    padding=st.integers(0, 33), seed=st.integers(0, 99),
)  # fmt: skip
def test_packing_round_trips(bits, inputs, outputs, padding, seed):
    length = (inputs + padding + 1) // 2 * 2
    codes = np.random.default_rng(seed).integers(*RANGE[bits], (inputs, outputs), np.int8, endpoint=True)
    rows = pack_rows(codes, bits, length)
    assert rows.shape == (outputs, length * bits // 8) and rows.dtype == np.int8
    assert np.array_equal(unpack_rows(rows, bits, inputs), codes)
    assert not unpack_rows(rows, bits, length)[inputs:].any()


def test_the_even_code_is_in_the_low_nibble():
    codes = np.array([[-8, 1], [7, -1]], np.int8)  # columns are outputs
    assert pack_rows(codes, 4, 2).view(np.uint8).tolist() == [[0x78], [0xF1]]
    assert pack_rows(codes, 8, 3).tolist() == [[-8, 7, 0], [1, -1, 0]]


@pytest.mark.parametrize(("bits", "length"), [(8, 3), (4, 5)])
def test_rows_that_do_not_fit_are_refused(bits, length):
    with pytest.raises(GraphError, match=f"4 codes of {bits} bits do not fit rows of {length}"):
        pack_rows(np.zeros((4, 2), np.int8), bits, length)


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_a_packed_weight_is_made_when_it_is_read(name, bits):
    source = np.random.default_rng(0).standard_normal((48, 3)).astype(np.float32)
    quantizer = ScaledRounding(weight_format(name), 16, search=False)
    packed = PackedRows(Quantization(InMemory(source), quantizer, Memo()), bits, 64)
    rows = packed.read()
    assert (packed.shape, packed.dtype) == (rows.shape, rows.dtype)
    codes = quantizer.quantize(source).codes.astype(np.int8)
    assert np.array_equal(unpack_rows(rows, bits, 48), codes)
