"""Transforms that tests put into graphs."""

from __future__ import annotations

import numpy as np

from rotexport.transforms.transform import InvertibleMatrix


def invertible(size: int, seed: int) -> InvertibleMatrix:
    rng = np.random.default_rng(seed)
    return InvertibleMatrix(rng.standard_normal((size, size)) + 2 * np.sqrt(size) * np.eye(size))
