"""Calls attention that chooses what stays on PyTorch tensors, and says in float64 what it must compute."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gpu_calls import EVICTION, TYPES, Launch, prepare
from structures import POLICIES, EvictionProblem

Tensor = torch.Tensor

AROUND = 2  # tokens on each side that share a score (snapkv)


@dataclass(frozen=True)
class Evicting:
    """Sizes and numbers of one operator."""

    policy: str = "heavy-hitter"
    head_size: int = 128
    value_size: int = 128
    kv_heads: int = 8
    repeat: int = 4
    sinks: int = 4
    window: int = 4092
    recent: int = 128
    context: int = 131072
    forget: float = 1.0
    observe: int = 32
    softcap: float = 0.0
    decay: float = 0.0
    dtype: torch.dtype = torch.float16

    @property
    def query_heads(self) -> int:
        """Query heads in all."""
        return self.kv_heads * self.repeat

    @property
    def scale(self) -> float:
        """The usual factor of logits."""
        return self.head_size**-0.5

    def slopes(self, device: torch.device) -> Tensor:
        """Return the decay of each query head, none for the first."""
        heads = self.query_heads
        return self.decay * torch.arange(heads, device=device, dtype=torch.float32) / max(heads - 1, 1)

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
class Call:
    """One call: new tensors [B, heads, S, size], lengths [B], and the cache, which it updates."""

    evicting: Evicting
    new: dict[str, Tensor]
    past_length: Tensor
    new_length: Tensor
    cache: dict[str, Tensor]

    @property
    def problem(self) -> EvictionProblem:
        """What the kernels are told of sizes."""
        e = self.evicting
        batch, _, tokens, _ = self.new["query"].shape
        return EvictionProblem(
            *(TYPES[e.dtype], batch, tokens, e.query_heads, e.kv_heads, e.head_size, e.value_size),
            *(e.sinks, e.window, e.scale, e.softcap),
            *(POLICIES[e.policy], e.recent, e.context, e.observe, e.forget),
        )


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


def expected(call: Call, row: int, head: int) -> Expected:
    """Compute one key head of one row by dense algebra."""
    e, device = call.evicting, call.past_length.device
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


def _scores(call: Call, row: int, drawn: Tensor, fresh: Tensor) -> Tensor:
    """Return the scores that a call gives: drawn [N, T] are weights, the first `fresh` tokens the call's."""
    e, count = call.evicting, int(call.new_length[row])
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

    def prepare(self, call: Call) -> Launch:
        """Bind the kernels to a call and a new output, which is poisoned."""
        tensors = call.new | {"past_length": call.past_length, "new_length": call.new_length}
        tensors["decay"] = call.evicting.slopes(call.past_length.device)
        return prepare(self._library, EVICTION, call.problem, tensors, call.cache)
