"""Finite fields, as far as Paley's constructions need them."""

from __future__ import annotations

from itertools import product
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


def prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    divisors = range(2, int(q**0.5) + 1)
    p = next((d for d in divisors if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


def character_matrix(p: int, k: int) -> Array:
    """Return Q, int8 [q, q] with Q[i, j] = χ(a_j - a_i), for the field of q = p^k elements, p odd.

    χ is the quadratic character: 0 at zero, 1 at the other squares, -1 elsewhere. Element a_i is the
    polynomial whose coefficients are the base-p digits of i, lowest first, so for k = 1 a_i is i itself.
    """
    place = p ** np.arange(k)
    digits = np.arange(p**k)[:, None] // place % p
    difference = ((digits[None, :, :] - digits[:, None, :]) % p) @ place
    matrix: Array = _quadratic_character(p, k)[difference]
    return matrix


def _quadratic_character(p: int, k: int) -> Array:
    """Return χ of every element: the even powers of a primitive element are the squares."""
    character = np.zeros(p**k, np.int8)
    for exponent, element in enumerate(_powers_of_primitive(p, k)):
        character[element] = 1 if exponent % 2 == 0 else -1
    return character


def _powers_of_primitive(p: int, k: int) -> list[int]:
    """Return 1, x, x^2, …, x^(q-2) modulo the first monic polynomial of degree k whose root x is primitive.

    For k = 1 the polynomials are x - g, so x stands for g, and the first that serves is a primitive root.
    """
    for tail in product(range(p), repeat=k):
        powers = _powers(tail, p)
        if powers is not None:
            return powers
    raise AssertionError(f"every finite field has a primitive element, GF({p}^{k}) too")


def _powers(tail: tuple[int, ...], p: int) -> list[int] | None:
    """Return the powers of x where x^k = Σ tail[i] x^i, or None when they repeat before q - 1 are seen."""
    k = len(tail)
    order = p**k - 1
    one = (1,) + (0,) * (k - 1)
    element, powers = one, []
    for _ in range(order):
        powers.append(sum(digit * p**i for i, digit in enumerate(element)))
        carry = element[-1]
        element = tuple(((element[i - 1] if i else 0) + carry * tail[i]) % p for i in range(k))
        if element == one:
            break
        if not any(element):
            return None
    return powers if len(powers) == order and element == one else None
