"""Locating the tensors of a pickled PyTorch file (`pytorch_model.bin`) without running or reading them."""

from __future__ import annotations

import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rotexport.errors import CheckpointError
from rotexport.graph.weights import Stored, Transposed, Weight

_DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


def read_pickled(path: Path) -> dict[str, Weight]:
    """Return the tensors of the file by stored name, without reading them.

    Only tensors and plain containers are unpickled (`weights_only`), and under fake tensors, where
    torch.load notes each storage's place in the file instead of loading it.

    Raises:
        CheckpointError: the file is truncated, holds other objects, or is in the format before PyTorch 1.6.
    """
    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects other than tensors (or is not a PyTorch file), which are never unpickled: "
            "save the model's state_dict, best as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a PyTorch file ({str(error).split('. ')[0]}); download it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state_dict; save the model's state_dict")
    return {name: _tensor(path, name, tensor) for name, tensor in state.items()}


def _tensor(path: Path, name: str, tensor: torch.Tensor) -> Weight:
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise CheckpointError(f"{path} is in the format before PyTorch 1.6; load and save it again")
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(
            f"tensor {name!r} in {path} has type {tensor.dtype}; "
            "pass the model in float32, float16 or bfloat16"
        )
    dtype = np.dtype(_DTYPES[tensor.dtype])
    offset = start + tensor.storage_offset() * dtype.itemsize
    if tensor.is_contiguous():
        return Stored(path, offset, dtype, tuple(tensor.shape))
    if tensor.ndim == 2 and tensor.t().is_contiguous():
        return Transposed(Stored(path, offset, dtype, tuple(tensor.t().shape)))
    raise CheckpointError(
        f"tensor {name!r} in {path} is a strided view; save the model with contiguous tensors"
    )
