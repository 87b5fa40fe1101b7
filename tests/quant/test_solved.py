"""Chosen codes survive their file, whatever their format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rotexport.errors import GraphError
from rotexport.quant.formats import weight_format
from rotexport.quant.scales import AsymmetricRounding, ScaledRounding
from rotexport.quant.solved import SolvedWeight, dequantized, save_solved

WEIGHT = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "group", "two_level"),
    [("int4", 16, True), ("int4", 16, False), ("int8", 64, False), ("fp8", 64, False)],
)
def test_what_is_read_is_what_was_written(name: str, group: int, two_level: bool, tmp_path: Path) -> None:
    number_format = weight_format(name)
    tensor = ScaledRounding(number_format, group, True, two_level).quantize(WEIGHT)
    save_solved(tmp_path / "block-0.npz", {"0.up": tensor, "0.gate": tensor})
    read = SolvedWeight(tmp_path / "block-0.npz", "0.gate", number_format, group).quantize(WEIGHT)
    assert read.codes.dtype == number_format.storage
    np.testing.assert_array_equal(read.codes.astype(np.float32), tensor.codes.astype(np.float32))
    np.testing.assert_array_equal(read.scales, tensor.scales)
    assert (read.factors is None) == (not two_level)
    np.testing.assert_allclose(dequantized(read), WEIGHT, atol=0.6 * np.abs(WEIGHT).max() / 7)
    assert [path.name for path in tmp_path.iterdir()] == ["block-0.npz"]


def test_codes_of_another_matrix_are_refused(tmp_path: Path) -> None:
    tensor = ScaledRounding(weight_format("int8"), 64, True).quantize(WEIGHT)
    save_solved(tmp_path / "block-0.npz", {"0.up": tensor})
    solved = SolvedWeight(tmp_path / "block-0.npz", "0.up", weight_format("int8"), 64)
    with pytest.raises(GraphError, match=r"site 0\.up: .* holds codes \(64, 6\), not \(64, 8\)"):
        solved.quantize(np.zeros((64, 8), np.float32))


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_zero_points_are_kept(name: str, tmp_path: Path) -> None:
    number_format = weight_format(name, symmetric=False)
    tensor = AsymmetricRounding(number_format, 16, search=True).quantize(WEIGHT + 1)
    save_solved(tmp_path / "block-0.npz", {"0.up": tensor})
    read = SolvedWeight(tmp_path / "block-0.npz", "0.up", number_format, 16).quantize(WEIGHT)
    assert read.zeros is not None and read.zeros.dtype == number_format.storage
    np.testing.assert_array_equal(read.zeros.astype(int), tensor.zeros.astype(int))
    np.testing.assert_array_equal(dequantized(read), dequantized(tensor))
    np.testing.assert_allclose(dequantized(read), WEIGHT + 1, atol=0.6 * np.ptp(WEIGHT + 1) / 15)
