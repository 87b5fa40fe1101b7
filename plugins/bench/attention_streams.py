"""Random streams for sink/window attention: what a call brings, and what the definition is told of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpu_attention import Attention
from structures import NEW


def random_new(
    attention: Attention, batch: int, tokens: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the tensors that a call brings."""
    made = attention.random_new(batch, tokens, device)
    if attention.rotated:
        made |= {name: (4 * made[name]).round() / 4 for name in NEW[:3]}
    return made


def special_inputs(
    attention: Attention, turns: torch.Tensor | None, past: Sequence[int], tokens: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return what only some operators take, of `turns` [B, N, angles]."""
    special = {"signs": attention.signs(device)} if attention.rotated else {}
    if turns is not None:
        rows = [attention.angles_seen(row, p, tokens) for row, p in zip(turns, past, strict=True)]
        special["mean_angles"] = torch.stack(rows)
    return special


def special_noise(
    attention: Attention, batch: int, tokens: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the same for measuring, whatever the angles are."""
    special = special_inputs(attention, None, [], tokens, device)
    if attention.angles:
        shape = (batch, attention.window + tokens, attention.angles)
        special["mean_angles"] = torch.randn(shape, device=device, dtype=attention.dtype)
    return special


def random_turns(attention: Attention, batch: int, length: int, device: torch.device) -> torch.Tensor | None:
    """Return angles [B, N, R] of a stream of N tokens, where keys are centered."""
    if not attention.angles:
        return None
    return torch.randn(batch, length, attention.angles, device=device, dtype=attention.dtype)


def definition_row(
    attention: Attention, streams: dict[str, torch.Tensor], turns: torch.Tensor | None, row: int, length: int
) -> dict[str, torch.Tensor]:
    """Return what the definition is told of one row's stream: rotated queries and keys, and their angles."""
    told = {name: tensor[row, :, :length] for name, tensor in streams.items()}
    if attention.rotated:
        told |= {name: attention.turned(told[name]) for name in NEW[:3]}
    return told if turns is None else told | {"turns": turns[row, :length]}
