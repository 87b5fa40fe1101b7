"""The fast Walsh-Hadamard transform, for every order that has a matrix."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rotexport.errors import TransformError
from rotexport.transforms.constructions import sylvester
from rotexport.transforms.orders import base_matrix, base_order

Array: TypeAlias = npt.NDArray[Any]

CHUNK_ELEMENTS = 1 << 17  # transformed at a time: a few 1 MB temporaries, which stay in the cache
SINGLE_THREADED = 1 << 17  # multiplications that OpenBLAS and MKL do not spread over threads
LARGEST_FACTOR = 64  # of Sylvester's matrix: products this wide run at matrix-multiplication speed


def fwht(x: Array, n: int, base: Array | None = None, transpose: bool = False) -> Array:
    """Return x · blockdiag(H, …, H) / √n along the last axis, or with Hᵀ for H: the inverse.

    H = B ⊗ S₁ ⊗ S₂ ⊗ … (Sylvester's matrices are Kronecker products of smaller ones), so a block, seen as a
    tensor with one axis per factor, is multiplied by one factor along each axis: n (m + Σ sᵢ) operations
    with sᵢ <= 64 instead of n².

    Args:
        x: float32 or float64 [..., D], D a multiple of n; other types are computed and returned in float64.
        n: order of the transform.
        base: ±1 matrix [m, m] with n / m a power of two; the project's own base of order n when not given.
        transpose: multiply by Hᵀ / √n. Bases need not be symmetric.

    Raises:
        TransformError: n does not divide D, or no matrix (with this base) has order n.

    """
    if base is None:
        base = base_matrix(base_order(n)[0])
    quotient, rest = divmod(n, len(base))
    if rest or quotient < 1 or quotient & (quotient - 1):
        raise TransformError(f"a base of order {len(base)} does not make a Hadamard matrix of order {n}")
    if x.shape[-1] % n:
        raise TransformError(f"blocks of {n} do not divide an axis of length {x.shape[-1]}")
    dtype = np.dtype(np.float32 if x.dtype == np.float32 else np.float64)
    factors = [base.T if transpose else base, *(sylvester(order) for order in _factors(quotient))]
    factors = [factor.astype(dtype) for factor in factors if len(factor) > 1]
    blocks = np.ascontiguousarray(x).reshape(-1, n)
    result = np.empty(blocks.shape, dtype)
    step = max(1, CHUNK_ELEMENTS // n)
    work = np.empty((2, min(step, len(blocks)), n), dtype)
    for start in range(0, len(blocks), step):
        rows = slice(start, start + step)
        _multiply(blocks[rows].astype(dtype, copy=False), factors, work, result[rows])
        result[rows] *= n**-0.5
    return result.reshape(x.shape)


def _factors(power: int) -> list[int]:
    """Split a power of two into as few factors up to LARGEST_FACTOR as possible, as equal as possible."""
    bits = power.bit_length() - 1
    count = -(-bits // (LARGEST_FACTOR.bit_length() - 1))
    return [1 << (bits * (i + 1) // count - bits * i // count) for i in range(count)]


def _multiply(rows: Array, factors: list[Array], work: Array, result: Array) -> None:
    """Write each row times the Kronecker product of `factors` to `result`.

    The last axis is multiplied by the last factor and moved to the front; after all factors the axes are
    back in order. `work` holds the two intermediate arrays (fresh ones would cost more than the arithmetic).
    """
    count, length = rows.shape
    product, moved = work[0, :count], work[1, :count]
    for factor in reversed(factors):
        order = len(factor)
        _matmul(rows.reshape(-1, order), factor, product.reshape(-1, order))
        rows = result if factor is factors[0] else moved
        axes_moved = product.reshape(count, length // order, order).swapaxes(1, 2)
        np.copyto(rows.reshape(count, order, length // order), axes_moved)
    if not factors:
        np.copyto(result, rows)


def _matmul(rows: Array, factor: Array, result: Array) -> None:
    """Write rows · factor to `result`, in products so small that BLAS does not wake its other threads.

    On tall, narrow matrices they gain nothing, and on a busy machine they cost ten times the product.
    """
    order = len(factor)
    height = max(1, SINGLE_THREADED // order**2)
    even = len(rows) // height * height
    np.matmul(rows[:even].reshape(-1, height, order), factor, out=result[:even].reshape(-1, height, order))
    np.matmul(rows[even:], factor, out=result[even:])
