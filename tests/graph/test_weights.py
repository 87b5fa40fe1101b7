"""Lazy expressions equal their float64 definition, whatever slab they are read in."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotexport.errors import GraphError
from rotexport.graph import weights
from rotexport.graph.weights import (
    Affine,
    BiasThrough,
    Cast,
    Centered,
    Folded,
    InMemory,
    Scaled,
    Stored,
    Transposed,
    transpose,
)
from rotexport.transforms.transform import Hadamard

RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((12, 20))
ROWS, COLUMNS = RNG.standard_normal(12), RNG.standard_normal(20)
ROTATION = Hadamard.of(12, seed=1)
OTHER = Hadamard.of(20, seed=2)


def matrix() -> InMemory:
    return InMemory(MATRIX)


EXPRESSIONS = {
    "scaled rows": (Scaled(matrix(), InMemory(ROWS), 0), ROWS[:, None] * MATRIX),
    "scaled columns": (Scaled(matrix(), InMemory(COLUMNS), 1), MATRIX * COLUMNS),
    "folded rows": (Folded(matrix(), ROTATION, 0), ROTATION.dense().T @ MATRIX),
    "folded columns": (Folded(matrix(), OTHER, 1), MATRIX @ OTHER.dense()),
    "folded twice": (
        Folded(Folded(matrix(), OTHER, 1), ROTATION, 0),
        ROTATION.dense().T @ MATRIX @ OTHER.dense(),
    ),
    "transposed": (Transposed(Scaled(matrix(), InMemory(ROWS), 0)), (ROWS[:, None] * MATRIX).T),
    "affine": (Affine(matrix(), factor=2.0, offset=1.0), 2 * MATRIX + 1),
    "centered": (Centered(matrix(), 1), MATRIX - MATRIX.mean(axis=1, keepdims=True)),
    "bias": (BiasThrough(InMemory(ROWS), matrix(), InMemory(COLUMNS)), ROWS @ MATRIX + COLUMNS),
}


@pytest.mark.parametrize("slab", [1, 30, 1 << 22])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_reading_evaluates_the_definition(name: str, slab: int, monkeypatch) -> None:
    monkeypatch.setattr(weights, "SLAB_ELEMENTS", slab)
    weight, expected = EXPRESSIONS[name]
    assert weight.shape == expected.shape
    np.testing.assert_allclose(weight.read(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in EXPRESSIONS if EXPRESSIONS[n][1].ndim == 2])
def test_transposing_commutes_with_every_expression(name: str) -> None:
    weight, expected = EXPRESSIONS[name]
    np.testing.assert_allclose(transpose(weight).read(), expected.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(transpose(transpose(weight)).read(), expected, rtol=1e-12, atol=1e-12)


def test_a_chain_rounds_once() -> None:
    stored = InMemory(MATRIX.astype(ml_dtypes.bfloat16))
    chain = Cast(
        Folded(Scaled(Cast(stored, np.dtype(np.float32)), InMemory(ROWS), 0), OTHER, 1), np.dtype(np.float16)
    )
    exact = (ROWS[:, None] * MATRIX.astype(ml_dtypes.bfloat16).astype(np.float64)) @ OTHER.dense()
    wrong = chain.read() != exact.astype(np.float16)
    assert wrong.mean() < 0.01  # float64 summation order may flip a tie, nothing else


def test_a_cast_inside_a_chain_does_round() -> None:
    twin = Cast(Cast(matrix(), np.dtype(ml_dtypes.bfloat16)), np.dtype(np.float32))
    np.testing.assert_array_equal(twin.read(), MATRIX.astype(ml_dtypes.bfloat16).astype(np.float32))


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(0, 9),
    st.integers(1, 7),
    st.integers(0, 64),
)
def test_stored_tensors_are_read_from_any_offset(
    tmp_path_factory, dtype: str, rows: int, columns: int, offset: int
) -> None:
    values = RNG.standard_normal((rows, columns)).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    path = tmp_path_factory.mktemp("stored") / "data"
    path.write_bytes(b"x" * offset + values.tobytes())
    stored = Stored(path, offset, values.dtype, values.shape)
    np.testing.assert_array_equal(stored.read(), values)
    np.testing.assert_array_equal(stored.slab(1, 0, 1), values[:, :1])


def test_expressions_are_equal_when_they_compute_the_same() -> None:
    assert Folded(matrix(), ROTATION, 0) == Folded(InMemory(MATRIX.copy()), Hadamard.of(12, seed=1), 0)
    assert Folded(matrix(), ROTATION, 0) != Folded(matrix(), Hadamard.of(12, seed=2), 0)
    assert hash(Transposed(matrix())) == hash(Transposed(InMemory(MATRIX.copy())))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(GraphError, match="size 12 does not fit axis 1"):
        Folded(matrix(), ROTATION, 1)
    with pytest.raises(GraphError, match=r"scale of shape \(12,\)"):
        Scaled(matrix(), InMemory(ROWS), 1)
