"""Streams of tokens for sink/window attention: inputs call by call, and what float64 says of them."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from emulated_attention import TYPES, Call, EmulatedAttention
from fast_hadamard_cases import sylvester
from structures import ATTENTION_CACHE, FORMATS, AttentionProblem

from rotexport.streaming.oracle import pack, quantize, ring_positions, to_fp8, visible

EPSILON = {np.dtype(np.float16): 2.0**-11, np.dtype(ml_dtypes.bfloat16): 2.0**-8}
TORCH = {np.dtype(np.float16): torch.float16, np.dtype(ml_dtypes.bfloat16): torch.bfloat16}
KINDS = ("key", "value")


@dataclass(frozen=True)
class Case:
    """The sizes and numbers of one operator.

    `bits` None keeps the window in floating point; `fp8` codes are numbers, not levels.
    """

    head_size: int = 64
    value_size: int = 64
    kv_heads: int = 1
    repeat: int = 1
    sinks: int = 2
    window: int = 20
    bits: int | None = None
    recent: int = 0
    group: int | None = None
    softcap: float = 0.0
    decay: float = 0.0
    dtype: type = np.float16
    angles: int = 0  # of the mean that keys are stored without
    rotated: bool = False
    fp8: bool = False

    @property
    def type(self) -> np.dtype:
        return np.dtype(self.dtype)

    @property
    def sizes(self) -> dict[str, int]:
        return {"key": self.head_size, "value": self.value_size}

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.repeat

    @property
    def scale(self) -> float:
        return float(np.float32(self.head_size**-0.5))

    @property
    def slopes(self) -> np.ndarray:
        """The decay of each query head: none for the first."""
        return np.float32(self.decay * np.arange(self.query_heads) / max(self.query_heads - 1, 1))

    @property
    def signs(self) -> np.ndarray:
        """What a rotation multiplies channels by first."""
        return np.where(np.arange(self.head_size) % 3 == 1, -1, 1).astype(self.type)

    def groups(self, kind: str) -> int:
        return self.sizes[kind] // (self.group or self.sizes[kind])

    @property
    def format(self) -> str:
        if self.bits is None:
            return "float"
        return "fp8" if self.fp8 else f"int{self.bits}"

    def numbers(self, batch: int, tokens: int) -> tuple[float, ...]:
        """What all attention operators are told of sizes."""
        return (
            *(TYPES[self.type], batch, tokens, self.query_heads, self.kv_heads),
            *(self.head_size, self.value_size, self.sinks, self.window, self.scale, self.softcap),
        )

    def problem(self, batch: int, tokens: int) -> AttentionProblem:
        return AttentionProblem(
            *self.numbers(batch, tokens),
            *(FORMATS[self.format], self.recent, self.groups("key"), self.groups("value")),
            *(self.angles, self.rotated),
        )

    def empty_cache(self, batch: int) -> dict[str, np.ndarray]:
        cache = {}
        for kind, size in self.sizes.items():
            heads = (batch, self.kv_heads)
            cache[f"sink_{kind}"] = np.zeros((*heads, max(self.sinks, 1), size), self.type)
            if self.bits is None:
                cache[f"window_{kind}"] = np.zeros((*heads, self.window, size), self.type)
                continue
            cache[f"window_{kind}"] = np.zeros((*heads, self.window, size * self.bits // 8), np.int8)
            scales = (*heads, self.window, self.groups(kind), 1 if self.fp8 else 2)
            cache[f"window_{kind}_scale"] = np.zeros(scales, self.type)
            if self.recent:
                cache[f"recent_{kind}"] = np.zeros((*heads, self.recent, size), self.type)
        return {name: cache[name] for name in ATTENTION_CACHE if name in cache}


class Stream:
    """One row of N tokens: queries [Hq, N, D], keys [Hk, N, D], values [Hk, N, Dv]."""

    def __init__(self, case: Case, length: int, rng: np.random.Generator) -> None:
        self.case = case

        def normal(heads: int, size: int) -> np.ndarray:
            return rng.standard_normal((heads, length, size), np.float32).astype(case.type)

        self.query = normal(case.query_heads, case.head_size)
        self.query_sink = normal(case.query_heads, case.head_size)
        self.key = normal(case.kv_heads, case.head_size)
        self.value = normal(case.kv_heads, case.value_size)
        self.given: dict[str, np.ndarray] = {}  # where an operator is told something else
        if case.rotated:
            for name in ("query", "query_sink", "key"):
                self.given[name] = (np.round(4 * getattr(self, name).astype(np.float32)) / 4).astype(
                    case.type
                )
                setattr(self, name, self._rotated(self.given[name]))
        if case.angles:
            self.turns = rng.standard_normal((length, case.angles), np.float32).astype(case.type)
            self.mean_query = normal(case.query_heads, case.angles)
            self.key_mean = normal(case.kv_heads, case.head_size)

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        """Return x rotated and rounded; its numbers have so few bits that sums are exact."""
        size = self.case.head_size
        sums = (x * self.case.signs).astype(np.float32) @ sylvester(size).astype(np.float32)
        return (sums * (np.float32(1) / np.sqrt(np.float32(size)))).astype(self.case.type)

    @property
    def centered(self) -> np.ndarray:
        """What codes are made of in place of keys, rounded."""
        if not self.case.angles:
            return self.key
        return (self.key.astype(np.float32) - self.key_mean.astype(np.float32)).astype(self.case.type)

    def stored(self, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what the window stores: codes, scales, and the values [Hk, N, size] in float64 they stand for."""
        case = self.case
        stored = self.centered if kind == "key" else self.value
        exact = torch.from_numpy(stored.astype(np.float64))
        size = case.sizes[kind]
        assert case.bits is not None
        if case.fp8:
            floats = to_fp8(exact, case.group or size, TORCH[case.type])
            scales = floats.scales[..., None].numpy().astype(case.type)
            return floats.numbers.view(torch.int8).numpy(), scales, floats.values().numpy()
        grid = quantize(exact, case.bits, case.group or size, TORCH[case.type])
        scales = torch.stack([grid.steps, grid.minima], -1).numpy().astype(case.type)
        return pack(grid.levels, case.bits).numpy(), scales, grid.values().numpy()

    def expected(self) -> np.ndarray:
        """Return the outputs [Hq, N, Dv] by dense algebra in float64."""
        case = self.case
        length = self.key.shape[1]
        distance = np.arange(length)[:, None] - np.arange(length)
        is_sink = np.broadcast_to(np.arange(length) < case.sinks, (length, length))
        exact = is_sink | (distance < case.recent)
        key, value = (getattr(self, kind).astype(np.float64).repeat(case.repeat, 0) for kind in KINDS)
        stored_key, stored_value = key, value
        if case.bits is not None:
            stored_key, stored_value = (self.stored(kind)[2].repeat(case.repeat, 0) for kind in KINDS)
        query, query_sink = self.query.astype(np.float64), self.query_sink.astype(np.float64)
        stored = query @ stored_key.swapaxes(1, 2)
        if case.angles:
            stored += self.mean_query.astype(np.float64) @ self.turns.astype(np.float64).T
        products = np.where(exact, query @ key.swapaxes(1, 2), stored)
        logits = case.scale * np.where(is_sink, query_sink @ key.swapaxes(1, 2), products)
        if case.softcap > 0:
            logits = case.softcap * np.tanh(logits / case.softcap)
        logits = logits - np.where(is_sink, 0, case.slopes.astype(np.float64)[:, None, None] * distance)
        logits = np.where(visible(length, case.sinks, case.window).numpy(), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights * exact) @ value + (weights * ~exact) @ stored_value

    def turns_seen(self, past: int, count: int, tokens: int) -> np.ndarray:
        """Return the angles [window + tokens, R] of a call: of the ring's slots, then of its own tokens."""
        case = self.case
        seen = np.full((case.window + tokens, case.angles), np.nan, case.type)
        for slot, j in enumerate(ring_positions(past, case.sinks, case.window)):
            if j is not None:
                seen[slot] = self.turns[j]
        seen[case.window : case.window + count] = self.turns[past : past + count]
        return seen

    def expected_cache(self, length: int) -> dict[str, np.ndarray]:
        """Return the row's cache after `length` tokens."""
        case = self.case
        cache = {name: tensor[0] for name, tensor in case.empty_cache(1).items()}
        for kind in KINDS:
            tokens = getattr(self, kind)
            sinks = min(case.sinks, length)
            cache[f"sink_{kind}"][:, :sinks] = tokens[:, :sinks]
            rings = {f"window_{kind}": tokens}
            if case.bits is not None:
                codes, scales, _ = self.stored(kind)
                rings = {f"window_{kind}": codes, f"window_{kind}_scale": scales}
            if case.recent:
                rings[f"recent_{kind}"] = tokens
            for name, content in rings.items():
                slots = cache[name].shape[1]
                for slot, j in enumerate(ring_positions(length, case.sinks, slots)):
                    if j is not None:
                        cache[name][:, slot] = content[:, j]
        return cache


class Session:
    """Calls of one operator on a batch of streams, with their cache."""

    def __init__(self, kernels: EmulatedAttention, case: Case, streams: list[Stream], seed: int = 0) -> None:
        self.kernels, self.case, self.streams = kernels, case, streams
        self.rng = np.random.default_rng(seed)
        self.cache = case.empty_cache(len(streams))
        self.past = np.zeros(len(streams), np.int32)

    def next_call(self, new: list[int], tokens: int, padding: float) -> Call:
        def batch_of(name: str) -> np.ndarray:
            rows = []
            for stream, past, count in zip(self.streams, self.past, new, strict=True):
                fresh = stream.given.get(name, getattr(stream, name))[:, past : past + count]
                rest = np.full((fresh.shape[0], tokens - count, fresh.shape[2]), padding, fresh.dtype)
                rows.append(np.concatenate([fresh, rest], axis=1))
            return np.stack(rows)

        tensors = (batch_of(name) for name in ("query", "query_sink", "key", "value"))
        lengths = (self.past.copy(), np.array(new, np.int32))
        others = {"signs": self.case.signs} if self.case.rotated else {}
        if self.case.angles:
            others |= {name: batch_of(name) for name in ("key_mean", "mean_query")}
            turns = [s.turns_seen(p, n, tokens) for s, p, n in zip(self.streams, self.past, new, strict=True)]
            others["mean_angles"] = np.stack(turns)
        return Call(*tensors, *lengths, self.case.slopes, self.cache, others)

    def call(
        self,
        new: list[int],
        tokens: int = 0,
        *,
        in_place: bool = True,
        schedule: int = 0,
        padding: float = np.nan,
    ) -> np.ndarray:
        """Bring new[b] tokens of each row, padded to `tokens`; return the output [B, Hq, tokens, Dv]."""
        tokens = max(tokens, *new)
        call = self.next_call(new, tokens, padding)
        problem = self.case.problem(len(new), tokens)
        output, self.cache = self.kernels.run(problem, call, in_place=in_place, schedule=schedule)
        self.past = self.past + np.array(new, np.int32)
        return output


def allowed(case: Case, stream: Stream) -> float:
    """The bound of kernels/attention.h, for logits of at most 32."""
    largest = np.abs(stream.value.astype(np.float64)).max()
    return (3 * EPSILON[case.type] + 2.0**-18 * 33) * largest
