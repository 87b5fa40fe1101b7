"""Sink/window attention from its definition, in float64: what operators and kernels are tested against.

Nothing here knows of caches, rings or calls: one row's whole stream is given at once and a mask says who sees
whom. For a query at position i and a key at position j (absolute, from 0), with s sinks and a window of w,

    visible(i, j) = j <= i and (j < s or i - j < w)
    logit(i, j)   = scale <q'_i, k_j> at sinks (j < s), scale <q_i, k_j> elsewhere
    logit         = softcap tanh(logit / softcap) where softcap > 0
    logit        -= decay_h (i - j) where j >= s

(StreamingLLM, arXiv 2309.17453, with per-head decay). Window keys and values are read as the cache stores
them, except the `recent` newest ones; sinks are always read as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor

SMALLEST_STEP = 1e-6  # of a quantization grid: a constant group stays finite


@dataclass(frozen=True)
class Definition:
    """The numbers of the definition.

    `bits` None stores floating point, `fp8` float8e4m3fn in place of levels; `group` counts channels per
    scale.
    """

    sinks: int
    window: int
    scale: float
    softcap: float = 0.0
    bits: int | None = None
    group: int | None = None
    recent: int = 0
    fp8: bool = False


@dataclass(frozen=True)
class Floats:
    """A tensor [..., D] as float8e4m3fn numbers [..., D] times scales [..., D / group] of their groups."""

    numbers: Tensor
    scales: Tensor

    def values(self) -> Tensor:
        """Return numbers * scale [..., D]."""
        group = self.numbers.shape[-1] // self.scales.shape[-1]
        return self.numbers.double() * self.scales.repeat_interleave(group, dim=-1)


@dataclass(frozen=True)
class Grid:
    """A tensor [..., D] on the grid of its groups.

    `levels` [..., D] are integers from 0, `steps` and `minima` [..., D / group] place them.
    """

    levels: Tensor
    steps: Tensor
    minima: Tensor

    def values(self) -> Tensor:
        """Return levels * step + minimum [..., D]."""
        group = self.levels.shape[-1] // self.steps.shape[-1]
        steps = self.steps.repeat_interleave(group, dim=-1)
        return self.levels * steps + self.minima.repeat_interleave(group, dim=-1)


def quantize(x: Tensor, bits: int, group: int, scale_type: torch.dtype = torch.float32) -> Grid:
    """Put x [..., D] on asymmetric grids of 2^bits levels, one per `group` channels.

    Steps and minima are rounded to `scale_type`, the type they are stored in, before levels are chosen.
    """
    groups = x.double().unflatten(-1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    steps = ((high - low) / (2**bits - 1)).clamp(min=SMALLEST_STEP).to(scale_type).double()
    minima = low.to(scale_type).double()
    levels = ((groups - minima[..., None]) / steps[..., None]).round().clamp(0, 2**bits - 1)
    return Grid(levels.flatten(-2), steps, minima)


def to_fp8(x: Tensor, group: int, scale_type: torch.dtype = torch.float32) -> Floats:
    """Round x [..., D] to float8e4m3fn numbers, the largest magnitude of `group` channels becoming 448.

    Scales are rounded to `scale_type`, the type they are stored in, before numbers are chosen.
    """
    groups = x.double().unflatten(-1, (-1, group))
    scales = (groups.abs().amax(-1) / 448).clamp(min=SMALLEST_STEP).to(scale_type).double()
    numbers = (groups / scales[..., None]).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    return Floats(numbers.flatten(-2), scales)


def visible(length: int, sinks: int, window: int) -> Tensor:
    """Return the mask [length, length]: entry (i, j) tells whether position i sees position j."""
    i = torch.arange(length)[:, None]
    j = torch.arange(length)[None, :]
    return (j <= i) & ((j < sinks) | (i - j < window))


@dataclass(frozen=True)
class Row:
    """One row's stream of N tokens.

    `query` [Hq, N, D] stands at absolute positions, `query_sink` at positions inside the cache; `key` is
    [Hk, N, D] and `value` [Hk, N, Dv]: query heads of a group share a key head.
    """

    query: Tensor
    query_sink: Tensor
    key: Tensor
    value: Tensor


def attend(definition: Definition, row: Row, decay: Tensor, key_mean: Tensor | None = None) -> Tensor:
    """Return the attention output [Hq, N, Dv] of one row's stream of N tokens, in float64.

    Args:
        definition: the numbers.
        row: queries, keys and values.
        decay: [Hq], not negative.
        key_mean: [Hk, N, D], the mean at each token's position, subtracted from keys before they are
            quantized and added back on reading.

    """
    length = row.query.shape[1]
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    is_sink = (position < definition.sinks)[None, :].expand(length, length)
    exact = is_sink | (distance < definition.recent)
    repeat = row.query.shape[0] // row.key.shape[0]
    mean = torch.zeros(()) if key_mean is None else key_mean
    per_key_head = (
        row.key,
        row.value,
        _stored(definition, row.key - mean) + mean,
        _stored(definition, row.value),
    )
    key, value, stored_key, stored_value = (t.double().repeat_interleave(repeat, 0) for t in per_key_head)
    q, q_sink = row.query.double(), row.query_sink.double()

    logits = torch.where(exact, q @ key.mT, q @ stored_key.mT)
    logits = definition.scale * torch.where(is_sink, q_sink @ key.mT, logits)
    if definition.softcap > 0:
        logits = definition.softcap * torch.tanh(logits / definition.softcap)
    logits = logits - torch.where(is_sink, 0.0, decay.double()[:, None, None] * distance)
    logits = logits.masked_fill(~visible(length, definition.sinks, definition.window), -torch.inf)
    weights = logits.softmax(-1)
    return (weights * exact) @ value + (weights * ~exact) @ stored_value


def _stored(definition: Definition, x: Tensor) -> Tensor:
    if definition.bits is None:
        return x
    group = definition.group or x.shape[-1]
    return (to_fp8(x, group) if definition.fp8 else quantize(x, definition.bits, group)).values()


def ring_positions(length: int, sinks: int, window: int) -> list[int | None]:
    """Return which position each ring slot holds after `length` tokens; None where it was never written."""
    slots: list[int | None] = [None] * window
    for j in range(sinks, length):
        slots[(j - sinks) % window] = j
    return slots


def pack(levels: Tensor, bits: int) -> Tensor:
    """Return the bytes (int8) that hold levels [..., D] of `bits` bits: [..., D bits / 8].

    A level is stored minus 2^(bits - 1) in two's complement; the first channel takes the lowest bits.
    """
    fields = (levels.long() - 2 ** (bits - 1)) & (2**bits - 1)
    places = torch.arange(8 // bits) * bits
    unsigned = (fields.unflatten(-1, (-1, 8 // bits)) << places).sum(-1)
    return unsigned.to(torch.uint8).view(torch.int8)
