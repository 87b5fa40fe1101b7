"""Which Hadamard matrices exist here.

A Hadamard matrix of order n = m 2^k is H = B ⊗ S: B the base of order m, S Sylvester's matrix of order
2^k, entries ±1; whoever applies it scales by 1/√n. Of all splits the one with the smallest base is taken,
since the base costs m operations per element and Sylvester's part only k. Bases come from the first
construction that has their order: Paley I, Paley II, Williamson, Turyn, else a Kronecker product of two.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rotexport.errors import TransformError
from rotexport.transforms.constructions import paley_one, paley_two, sylvester, turyn, williamson

Array: TypeAlias = npt.NDArray[Any]

LARGEST_BASE = 2048  # a base is a dense table (here 4 MB) and costs as many operations per element


def base_order(n: int) -> tuple[int, int]:
    """Split n into (m, 2^k), m the smallest order of a base that can be constructed.

    Raises:
        TransformError: no such split exists.

    """
    split = _split(n)
    if split is None:
        remedy = f"; the largest block that divides it has order {largest_block(n)}" if n > 0 else ""
        raise TransformError(f"no Hadamard matrix of order {n} can be constructed{remedy}")
    return split


def base_matrix(m: int) -> Array:
    """Return the base of order m, int8 [m, m] of ±1 (read-only) with B Bᵀ = m I.

    Raises:
        TransformError: no construction has this order; powers of two above 1 have base 1.

    """
    matrix = _base(m)
    if matrix is None:
        raise TransformError(
            f"{m} is not the order of a Hadamard base; base_order splits an order into base and power of two"
        )
    return matrix


def hadamard_matrix(n: int) -> Array:
    """Return base ⊗ Sylvester of order n as int8 [n, n] of ±1.

    Raises:
        TransformError: no such matrix can be constructed.

    """
    m, power = base_order(n)
    return np.kron(base_matrix(m), sylvester(power))


def largest_block(n: int) -> int:
    """Return the largest constructible order that divides n; at least 1."""
    if n < 1:
        raise TransformError(f"a width must be positive, got {n}")
    return next(block for block in range(n, 0, -1) if n % block == 0 and _split(block))


def _split(n: int) -> tuple[int, int] | None:
    power = n & -n
    while n > 0 and power > 0:
        if n // power <= LARGEST_BASE and _base(n // power) is not None:
            return n // power, power
        power //= 2
    return None


@lru_cache(maxsize=32)
def _base(m: int) -> Array | None:
    if m == 1:
        return sylvester(1)
    if m < 4 or m % 4 or m & (m - 1) == 0:
        return None
    for construct in (paley_one, paley_two, williamson, turyn, _kronecker_product):
        matrix = construct(m)
        if matrix is not None:
            matrix.flags.writeable = False
            return matrix
    return None


def _kronecker_product(m: int) -> Array | None:
    for left in range(4, int(m**0.5) + 1, 4):
        if m % left == 0 and (first := _base(left)) is not None and (second := _base(m // left)) is not None:
            return np.kron(first, second)
    return None
