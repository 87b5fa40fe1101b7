"""The canonical operators in PyTorch, differentiable: what evaluates a block outside ONNX Runtime.

Each takes a node's inputs and attributes; results equal those of ONNX's own definitions within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from rotexport.errors import UnsupportedModelError

Inputs: TypeAlias = "Sequence[Tensor]"
Attributes: TypeAlias = "Mapping[str, Any]"
Operator: TypeAlias = "Callable[[Inputs, Attributes], Tensor | tuple[Tensor, ...]]"

TYPES: Final = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.BOOL: torch.bool,
}


def _integers(tensor: Tensor) -> list[int]:
    return [int(value) for value in tensor.reshape(-1).tolist()]


def _reshape(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, wanted = inputs[0], _integers(inputs[1])
    keep_zero = bool(attributes.get("allowzero", 0))
    shape = [x.shape[i] if size == 0 and not keep_zero else size for i, size in enumerate(wanted)]
    return x.reshape(shape)


def _transpose(inputs: Inputs, attributes: Attributes) -> Tensor:
    order = attributes.get("perm") or list(reversed(range(inputs[0].ndim)))
    return inputs[0].permute(*order)


def _shape(inputs: Inputs, attributes: Attributes) -> Tensor:
    sizes = list(inputs[0].shape)[attributes.get("start", 0) : attributes.get("end")]
    return torch.tensor(sizes, dtype=torch.int64)


def _squeeze(inputs: Inputs, _: Attributes) -> Tensor:
    x = inputs[0]
    return x.squeeze(tuple(_integers(inputs[1]))) if len(inputs) > 1 else x.squeeze()


def _unsqueeze(inputs: Inputs, _: Attributes) -> Tensor:
    x, axes = inputs[0], _integers(inputs[1])
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _range(inputs: Inputs, _: Attributes) -> Tensor:
    start, limit, delta = (tensor.item() for tensor in inputs)
    return torch.arange(start, limit, delta, dtype=inputs[0].dtype)


def _gather(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, indices = inputs
    axis = attributes.get("axis", 0) % x.ndim
    picked = x.index_select(axis, indices.reshape(-1) % x.shape[axis])
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _split(inputs: Inputs, attributes: Attributes) -> tuple[Tensor, ...]:
    x, axis = inputs[0], attributes.get("axis", 0)
    equal = math.ceil(x.shape[axis] / attributes.get("num_outputs", 1))
    sizes = _integers(inputs[1]) if len(inputs) > 1 else equal
    return tuple(torch.split(x, sizes, axis))


def _slice(inputs: Inputs, _: Attributes) -> Tensor:
    x, starts, ends = inputs[0], _integers(inputs[1]), _integers(inputs[2])
    axes = _integers(inputs[3]) if len(inputs) > 3 else list(range(len(starts)))
    steps = _integers(inputs[4]) if len(inputs) > 4 else [1] * len(starts)
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _expand(inputs: Inputs, _: Attributes) -> Tensor:
    x = inputs[0]
    return x.expand(torch.broadcast_shapes(x.shape, torch.Size(_integers(inputs[1]))))


def _rms_normalization(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, scale = inputs
    axes = list(range(attributes.get("axis", -1) % x.ndim, x.ndim))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + attributes.get("epsilon", 1e-5)) * scale


def _layer_normalization(inputs: Inputs, attributes: Attributes) -> Tensor:
    x = inputs[0]
    shape = x.shape[attributes.get("axis", -1) % x.ndim :]
    bias = inputs[2] if len(inputs) > 2 else None
    return functional.layer_norm(x, shape, inputs[1], bias, attributes.get("epsilon", 1e-5))


def _rotary_embedding(inputs: Inputs, attributes: Attributes) -> Tensor:
    """x [batch, heads, tokens, size], cos and sin [batch, tokens, rotated / 2]; halves, not interleaved."""
    x, cos, sin = inputs[0], inputs[1].unsqueeze(1), inputs[2].unsqueeze(1)
    if attributes.get("interleaved", 0):
        raise UnsupportedModelError(
            "the model rotates interleaved channels, which blocks in PyTorch do not; use method: search"
        )
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _attention(inputs: Inputs, attributes: Attributes) -> Tensor:
    """Queries [B, H, S, d] on keys and values [B, H / r, T, d]; an additive or boolean mask."""
    query, key, value = inputs[:3]
    mask = inputs[3] if len(inputs) > 3 else None
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scale = attributes.get("scale", 1 / math.sqrt(query.shape[-1]))
    softcap = attributes.get("softcap", 0.0)
    causal = bool(attributes.get("is_causal", 0))
    if not softcap:
        return functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale)
    logits = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    if causal:
        visible = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        logits = logits.masked_fill(~visible, -math.inf)
    return torch.softmax(logits, -1) @ value


def _fast_hadamard(inputs: Inputs, _: Attributes) -> Tensor:
    """(x · signs) times base ⊗ hi ⊗ lo / √n in blocks of n, as its ONNX body does."""
    x, signs, base, hi, lo = inputs
    left = torch.kron(base.to(x.dtype), hi.to(x.dtype))
    size = len(left) * len(lo)
    blocks = (x * (signs / math.sqrt(size))).reshape(-1, len(left), len(lo))
    return (left.T @ (blocks @ lo.to(x.dtype))).reshape(x.shape)


def _kronecker(inputs: Inputs, _: Attributes) -> Tensor:
    """(x · scale)(left ⊗ right), as its ONNX body does."""
    x, scale, left, right = inputs
    matrices = (x * scale).reshape(-1, len(left), len(right))
    return (left.T @ (matrices @ right)).reshape(x.shape)


def _gelu(inputs: Inputs, attributes: Attributes) -> Tensor:
    kind = attributes.get("approximate", "none")
    return functional.gelu(inputs[0], approximate=kind.decode() if isinstance(kind, bytes) else kind)


def _clip(inputs: Inputs, _: Attributes) -> Tensor:
    return torch.clamp(inputs[0], *inputs[1:3])


OPERATORS: Final[dict[str, Operator]] = {
    "Add": lambda x, _: x[0] + x[1],
    "And": lambda x, _: torch.logical_and(x[0], x[1]),
    "Attention": _attention,
    "Cast": lambda x, a: x[0].to(TYPES[a["to"]]),
    "Clip": _clip,
    "Concat": lambda x, a: torch.cat(list(x), a["axis"]),
    "Cos": lambda x, _: torch.cos(x[0]),
    "Div": lambda x, _: x[0] / x[1],
    "Equal": lambda x, _: x[0] == x[1],
    "Erf": lambda x, _: torch.erf(x[0]),
    "Expand": _expand,
    "FastHadamard": _fast_hadamard,
    "Gather": _gather,
    "Gelu": _gelu,
    "Greater": lambda x, _: x[0] > x[1],
    "GreaterOrEqual": lambda x, _: x[0] >= x[1],
    "Identity": lambda x, _: x[0],
    "KroneckerTransform": _kronecker,
    "LayerNormalization": _layer_normalization,
    "Less": lambda x, _: x[0] < x[1],
    "LessOrEqual": lambda x, _: x[0] <= x[1],
    "MatMul": lambda x, _: x[0] @ x[1],
    "Max": lambda x, _: torch.maximum(x[0], x[1]),
    "Min": lambda x, _: torch.minimum(x[0], x[1]),
    "Mul": lambda x, _: x[0] * x[1],
    "Neg": lambda x, _: -x[0],
    "Not": lambda x, _: torch.logical_not(x[0]),
    "Or": lambda x, _: torch.logical_or(x[0], x[1]),
    "Pow": lambda x, _: torch.pow(x[0], x[1]),
    "RMSNormalization": _rms_normalization,
    "Range": _range,
    "Relu": lambda x, _: torch.relu(x[0]),
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary_embedding,
    "Shape": _shape,
    "Sigmoid": lambda x, _: torch.sigmoid(x[0]),
    "Sin": lambda x, _: torch.sin(x[0]),
    "Slice": _slice,
    "Softmax": lambda x, a: torch.softmax(x[0], a.get("axis", -1)),
    "Split": _split,
    "Sqrt": lambda x, _: torch.sqrt(x[0]),
    "Squeeze": _squeeze,
    "Sub": lambda x, _: x[0] - x[1],
    "Tanh": lambda x, _: torch.tanh(x[0]),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": lambda x, _: torch.where(x[0], x[1], x[2]),
}
