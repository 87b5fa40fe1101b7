"""Constructions of Hadamard matrices: int8 arrays H of ±1 with H Hᵀ = n I.

Sources: Sylvester (1867); Paley, "On orthogonal matrices" (1933); Williamson, "Hadamard's determinant theorem
and the sum of four squares" (1944); Turyn, "Hadamard matrices, Baumert-Hall units, four-symbol sequences,
pulse compression, and surface wave encodings" (1974), with the array of Goethals and Seidel (1967).
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rotexport.transforms.galois import character_matrix, prime_power

Array: TypeAlias = npt.NDArray[Any]


def sylvester(n: int) -> Array:
    """Return the n x n matrix for n a power of two: entry (i, j) is -1 to the number of ones in i & j."""
    matrix = np.ones((1, 1), np.int8)
    doubling = np.array([[1, 1], [1, -1]], np.int8)
    while len(matrix) < n:
        matrix = np.kron(doubling, matrix)
    return matrix


def paley_one(n: int) -> Array | None:
    """Return I + S, S = [[0, 1], [-1, Q]], where n - 1 is a prime power ≡ 3 (mod 4); else None."""
    field = prime_power(n - 1)
    if field is None or (n - 1) % 4 != 3:
        return None
    matrix = np.ones((n, n), np.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = character_matrix(*field) + np.eye(n - 1, dtype=np.int8)
    return matrix


def paley_two(n: int) -> Array | None:
    """Return C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]], C = [[0, 1], [1, Q]]; else None.

    The order is 2(q + 1), q a prime power ≡ 1 (mod 4).
    """
    q = n // 2 - 1
    field = prime_power(q)
    if n % 2 or field is None or q % 4 != 1:
        return None
    conference = np.ones((q + 1, q + 1), np.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = character_matrix(*field)
    off_diagonal = np.array([[1, 1], [1, -1]], np.int8)
    diagonal = np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(conference, off_diagonal) + np.kron(np.eye(q + 1, dtype=np.int8), diagonal)


def williamson(n: int) -> Array | None:
    """Return Williamson's array of four symmetric circulants whose first rows are tabulated; else None."""
    halves = _sequences("williamson.txt").get(n)
    if halves is None:
        return None
    a, b, c, d = (_circulant(np.concatenate([half, half[:0:-1]])) for half in halves)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def turyn(n: int) -> Array | None:
    """Return the matrix of order 4(3l - 1) made from tabulated Turyn-type sequences; else None.

    Sequences X, Y, Z of length l and W of length l - 1 whose aperiodic autocorrelations satisfy
    N_X + N_Y + 2 N_Z + 2 N_W = 0 give base sequences (Z W), (Z -W), X, Y, whose half sums and differences,
    padded with zeros, are T-sequences, whose signed sums are the circulants of a Goethals-Seidel array.
    """
    sequences = _sequences("turyn.txt").get(n)
    if sequences is None:
        return None
    x, y, z, w = sequences
    none_long, none_short = np.zeros(len(z) + len(w), np.int8), np.zeros(len(x), np.int8)
    t1 = np.concatenate([z, 0 * w, none_short])
    t2 = np.concatenate([0 * z, w, none_short])
    t3 = np.concatenate([none_long, (x + y) // 2])
    t4 = np.concatenate([none_long, (x - y) // 2])
    rows = (t1 + t2 + t3 + t4, -t1 + t2 + t3 - t4, -t1 - t2 + t3 + t4, -t1 + t2 - t3 + t4)
    return _goethals_seidel(*(_circulant(row) for row in rows))


def _goethals_seidel(a: Array, b: Array, c: Array, d: Array) -> Array:
    br, cr, dr = (matrix[:, ::-1] for matrix in (b, c, d))
    btr, ctr, dtr = (matrix.T[:, ::-1] for matrix in (b, c, d))
    return np.block([[a, br, cr, dr], [-br, a, dtr, -ctr], [-cr, -dtr, a, btr], [-dr, ctr, -btr, a]])


def _circulant(row: Array) -> Array:
    index = np.arange(len(row))
    circulant: Array = row[(index[None, :] - index[:, None]) % len(row)]
    return circulant


@cache
def _sequences(file_name: str) -> dict[int, tuple[Array, ...]]:
    """Read lines `order sequence sequence …` of + and - signs; `#` starts a comment."""
    table: dict[int, tuple[Array, ...]] = {}
    for line in (files(__package__) / file_name).read_text("utf-8").splitlines():
        words = line.partition("#")[0].split()
        if words:
            table[int(words[0])] = tuple(
                np.array([1 if sign == "+" else -1 for sign in word], np.int8) for word in words[1:]
            )
    return table
