"""Learned rotations in files, in the layout of SpinQuant's `R.bin`: a PyTorch dictionary of matrices.

`R1` [width, width] rotates the residual stream, `model.layers.{i}.self_attn.R2` [head, head] the values of
block i, both acting on row vectors, x → x R.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from rotexport.errors import TransformError
from rotexport.transforms.base import Transform
from rotexport.transforms.matrices import OrthogonalMatrix

R1_KEY: Final = "R1"


def rotation_key(block: int | None) -> str:
    """Return the key of R1, or of a block's R2."""
    return R1_KEY if block is None else f"model.layers.{block}.self_attn.R2"


def read_rotation(path: Path, block: int | None, size: int) -> OrthogonalMatrix:
    """Read R1 (no block) or a block's R2, re-orthonormalized in float64.

    Files hold what training left in float32; the nearest orthogonal matrix differs by that rounding only.

    Raises:
        TransformError: there is no such file or key, or its matrix has another size or is not orthogonal.

    """
    import torch

    if not path.is_file():
        raise TransformError(f"rotation file '{path}' does not exist")
    try:
        kept = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise TransformError(f"rotation file '{path}' is not a PyTorch file of tensors: {reason}") from error
    key = rotation_key(block)
    if not isinstance(kept, Mapping) or key not in kept:
        raise TransformError(f"rotation file '{path}' has no '{key}'")
    matrix = kept[key].double().numpy()
    if matrix.shape != (size, size):
        shape = "x".join(map(str, matrix.shape))
        raise TransformError(f"'{key}' of '{path}' is {shape}, but the model's axis has {size} channels")
    OrthogonalMatrix(matrix)
    left, _, right = np.linalg.svd(matrix)
    return OrthogonalMatrix(left @ right)


def write_rotations(path: Path, rotations: Mapping[int | None, Transform]) -> None:
    """Write R1, under None, and R2, by block, as float64 matrices."""
    import torch

    dense = {rotation_key(block): transform.dense() for block, transform in rotations.items()}
    torch.save({key: torch.from_numpy(np.array(matrix)) for key, matrix in dense.items()}, path)
