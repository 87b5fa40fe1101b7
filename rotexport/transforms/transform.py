"""Every transform that recipes, passes and weights name."""

from rotexport.transforms.base import BlockDiagonal, Identity, Transform
from rotexport.transforms.composites import Composition, KroneckerPair, ScaledKronecker
from rotexport.transforms.hadamard import Hadamard, HeadMix
from rotexport.transforms.matrices import Diagonal, InvertibleMatrix, OrthogonalMatrix, Permutation

__all__ = [
    "BlockDiagonal",
    "Composition",
    "Diagonal",
    "Hadamard",
    "HeadMix",
    "Identity",
    "InvertibleMatrix",
    "KroneckerPair",
    "OrthogonalMatrix",
    "Permutation",
    "ScaledKronecker",
    "Transform",
]
