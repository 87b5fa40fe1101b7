"""Calls attention that chooses what stays on PyTorch tensors, and says in float64 what it must compute."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gpu_calls import EVICTION, Call, Launch, Sizes, prepare
from structures import POLICIES, EvictionProblem

Tensor = torch.Tensor

AROUND = 2  # tokens on each side that share a score (snapkv)


@dataclass(frozen=True)
class Evicting(Sizes):
    """Sizes and numbers of one operator."""

    policy: str = "heavy-hitter"
    recent: int = 128
    context: int = 131072
    forget: float = 1.0
    observe: int = 32

    def problem(self, batch: int, tokens: int) -> EvictionProblem:
        """Return what the kernels are told of a call's sizes."""
        return EvictionProblem(
            *self.numbers(batch, tokens),
            *(POLICIES[self.policy], self.recent, self.context, self.observe, self.forget),
        )

    def cache(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Return an empty cache, in the order of the operator's inputs."""
        heads = (batch, self.kv_heads)
        sizes = {"key": self.head_size, "value": self.value_size}
        slots = {"sink": max(self.sinks, 1), "window": self.window}
        made = {
            f"{part}_{kind}": torch.zeros(*heads, count, size, dtype=self.dtype, device=device)
            for part, count in slots.items()
            for kind, size in sizes.items()
        }
        made["window_position"] = torch.zeros(*heads, self.window, dtype=torch.int32, device=device)
        made["window_score"] = torch.zeros(*heads, self.window, device=device)
        return made

    def cache_bytes(self, batch: int) -> int:
        """Return the bytes of a cache, which a call reads once at least."""
        return sum(tensor.nbytes for tensor in self.cache(batch, torch.device("meta")).values())


@dataclass(frozen=True)
class Expected:
    """What one key head of one row computes, in float64, from the cache before the call.

    The output [repeat, N, Dv]; and of every token that may stay, newest first: position, key, value, score,
    and score times norm of the value.
    """

    output: Tensor
    positions: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    worth: Tensor


def expected(call: Call[Evicting], row: int, head: int) -> Expected:
    """Compute one key head of one row by dense algebra."""
    e, device = call.sizes, call.past_length.device
    past, count = int(call.past_length[row]), int(call.new_length[row])
    group = slice(head * e.repeat, (head + 1) * e.repeat)
    fresh = {name: t[row, :, :count] for name, t in call.new.items()}
    held = call.cache["window_position"][row, head].long() - 1
    kept = held >= 0
    new = torch.arange(past + count - 1, past - 1, -1, device=device)
    is_slot_token = new >= e.sinks
    positions = torch.cat([new[is_slot_token], held[kept]])
    tokens = {
        kind: torch.cat(
            [
                fresh[kind][head].flip(0)[is_slot_token],
                call.cache[f"window_{kind}"][row, head][kept],
            ]
        )
        for kind in ("key", "value")
    }
    sinks = {}
    for kind in ("key", "value"):
        sinks[kind] = call.cache[f"sink_{kind}"][row, head][: min(e.sinks, past)]
        sinks[kind] = torch.cat([sinks[kind], fresh[kind][head][: max(e.sinks - past, 0)]])
    i = torch.arange(past, past + count, device=device)[:, None]
    sink_seen = torch.arange(len(sinks["key"]), device=device) <= i
    distance = i - positions
    seen = (distance >= 0) & (distance < e.context)
    bounded = partial(_bounded, e)
    slopes = e.slopes(device)[group].double()[:, None, None]
    logits = torch.cat(
        [
            bounded(fresh["query_sink"][group], sinks["key"]).masked_fill(~sink_seen, -torch.inf),
            (bounded(fresh["query"][group], tokens["key"]) - slopes * distance).masked_fill(
                ~seen, -torch.inf
            ),
        ],
        -1,
    )
    weights = logits.softmax(-1)
    output = weights @ torch.cat([sinks["value"], tokens["value"]]).double()
    scores = _scores(call, row, weights[..., len(sinks["key"]) :].sum(0), (positions >= past).sum())
    held_scores = call.cache["window_score"][row, head][kept].double()
    memory = e.forget**count if e.policy == "heavy-hitter" else 1.0
    scores[len(scores) - len(held_scores) :] += memory * held_scores
    usable = past + count - positions < e.context
    tokens = {kind: t[usable] for kind, t in tokens.items()}
    worth = scores[usable] * tokens["value"].double().norm(dim=-1)
    return Expected(output, positions[usable], tokens["key"], tokens["value"], scores[usable], worth)


def _bounded(evicting: Evicting, query: Tensor, key: Tensor) -> Tensor:
    logits = evicting.scale * (query.double() @ key.double().mT)
    cap = evicting.softcap
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def _scores(call: Call[Evicting], row: int, drawn: Tensor, fresh: Tensor) -> Tensor:
    """Return the scores that a call gives: drawn [N, T] are weights, the first `fresh` tokens the call's."""
    e, count = call.sizes, int(call.new_length[row])
    age = torch.arange(count - 1, -1, -1, device=drawn.device, dtype=torch.float64)
    if e.policy == "heavy-hitter":
        return (e.forget**age) @ drawn
    if int(call.past_length[row]) > 0:
        return drawn.new_zeros(drawn.shape[-1])
    mass = (age < e.observe).double() @ drawn
    around = torch.nn.functional.avg_pool1d(
        mass[None, : int(fresh)], 2 * AROUND + 1, 1, AROUND, count_include_pad=False
    )
    return torch.cat([around[0], mass[int(fresh) :]])


class EvictionKernels:
    """The kernels of a built library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def prepare(self, call: Call[Evicting]) -> Launch:
        """Bind the kernels to a call and a new output, which is poisoned."""
        return prepare(self._library, EVICTION, call)
