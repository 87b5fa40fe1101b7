"""Calls sink/window attention on PyTorch tensors, and says in float64 what it must compute."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_calls import ATTENTION, Call, Launch, Sizes, prepare
from structures import ATTENTION_CACHE, FORMATS, AttentionProblem

from rotexport.streaming.oracle import quantize, ring_positions, to_fp8, visible


@dataclass(frozen=True)
class Attention(Sizes):
    """Sizes and numbers of one operator.

    `bits` None keeps the window in floating point; `fp8` codes are numbers, not levels.
    """

    bits: int | None = None
    recent: int = 0
    group: int | None = None
    angles: int = 0  # of the mean that keys are stored without
    rotated: bool = False
    fp8: bool = False

    def problem(self, batch: int, tokens: int) -> AttentionProblem:
        """Return what the kernels are told of a call's sizes."""
        return AttentionProblem(
            *self.numbers(batch, tokens),
            *(FORMATS[self.format], self.recent, self.groups(self.head_size), self.groups(self.value_size)),
            *(self.angles, self.rotated),
        )

    @property
    def heads(self) -> dict[str, tuple[int, int]]:
        """Heads of each tensor that a call brings, and their size."""
        if not self.angles:
            return super().heads
        means = {"key_mean": (self.kv_heads, self.head_size), "mean_query": (self.query_heads, self.angles)}
        return super().heads | means

    @property
    def format(self) -> str:
        """What the window holds."""
        if self.bits is None:
            return "float"
        return "fp8" if self.fp8 else f"int{self.bits}"

    @property
    def form(self) -> str:
        """How the window is kept, in words."""
        kept = self.format
        kept += f", {self.recent} recent" if self.recent else ""
        kept += ", centered" if self.angles else ""
        return f"{kept}, rotated" if self.rotated else kept

    def groups(self, size: int) -> int:
        """Return the number of groups of a head of `size` channels."""
        return size // (self.group or size)

    def cache(self, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Return an empty cache, in the order of the operator's inputs."""
        made = {}
        for kind, size in (("key", self.head_size), ("value", self.value_size)):
            shapes = {"sink": (max(self.sinks, 1), size), "window": (self.window, size)}
            if self.bits is not None:
                shapes["window"] = (self.window, size * self.bits // 8)
                made[f"window_{kind}_scale"] = (self.window, self.groups(size), 1 if self.fp8 else 2)
            if self.recent:
                shapes["recent"] = (self.recent, size)
            made |= {f"{part}_{kind}": shape for part, shape in shapes.items()}
        return {
            name: torch.zeros(
                (batch, self.kv_heads, *made[name]),
                dtype=torch.int8 if self.bits and name in {"window_key", "window_value"} else self.dtype,
                device=device,
            )
            for name in ATTENTION_CACHE
            if name in made
        }

    def cache_bytes_read(self, batch: int) -> int:
        """Return the bytes that decoding a token with a full cache must read, scales included."""
        tensors = self.cache(1, torch.device("meta"))
        angles = self.window * self.angles * self.dtype.itemsize
        return batch * (sum(t.nbytes for t in tensors.values()) + angles)

    def expected(self, row: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the outputs [Hq, N, Dv] of one row's stream [heads, N, size] by dense algebra in float64."""
        length = row["key"].shape[1]
        device = row["key"].device
        index = torch.arange(length, device=device)
        distance = index[:, None] - index
        is_sink = (index < self.sinks).expand(length, length)
        exact = is_sink | (distance < self.recent)
        key, value = (row[kind].double().repeat_interleave(self.repeat, 0) for kind in ("key", "value"))
        stored_key, stored_value = key, value
        if self.bits is not None:
            centered = row["key"] - row["key_mean"] if self.angles else row["key"]
            stored_key, stored_value = (
                self._stored(t.repeat_interleave(self.repeat, 0), self.bits) for t in (centered, row["value"])
            )
        query, query_sink = row["query"].double(), row["query_sink"].double()
        stored = query @ stored_key.mT
        if self.angles:
            stored = stored + row["mean_query"].double() @ row["turns"].double().mT
        products = torch.where(exact, query @ key.mT, stored)
        logits = self.scale * torch.where(is_sink, query_sink @ key.mT, products)
        if self.softcap > 0:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        slopes = self.slopes(device).double()[:, None, None]
        logits = logits - torch.where(is_sink, 0.0, slopes * distance)
        seen = visible(length, self.sinks, self.window).to(device)
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights * exact) @ value + (weights * ~exact) @ stored_value

    def _stored(self, x: torch.Tensor, bits: int) -> torch.Tensor:
        """Return what codes make of x."""
        group = self.group or x.shape[-1]
        kept = to_fp8(x, group, self.dtype) if self.fp8 else quantize(x, bits, group, self.dtype)
        return kept.values()

    @property
    def factor(self) -> float:
        """What a rotation multiplies sums by, in float32."""
        return float(1 / torch.tensor(float(self.head_size)).sqrt())

    def signs(self, device: torch.device) -> torch.Tensor:
        """Return what a rotation multiplies channels by first."""
        return 1 - 2 * (torch.arange(self.head_size, device=device) % 3 == 1).to(self.dtype)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """Return x rotated and rounded; numbers of few bits, so that sums in float32 are exact."""
        hadamard = torch.ones(1, 1, device=x.device)
        while len(hadamard) < self.head_size:
            hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=x.device), hadamard)
        sums = (x * self.signs(x.device)).double() @ hadamard.double()
        return (sums.float() * self.factor).to(self.dtype)

    def angles_seen(self, turns: torch.Tensor, past: int, tokens: int) -> torch.Tensor:
        """Return rows [window + tokens, R] of turns [N, R]: of the ring's slots, then of a call's tokens.

        Slots and tokens that do not exist have NaN.
        """
        seen = torch.full_like(turns[:1], torch.nan).repeat(self.window + tokens, 1)
        held = [
            (slot, j) for slot, j in enumerate(ring_positions(past, self.sinks, self.window)) if j is not None
        ]
        if held:
            slots, positions = torch.tensor(held, device=turns.device).T
            seen[slots] = turns[positions]
        fresh = turns[past : past + tokens]
        seen[self.window : self.window + len(fresh)] = fresh
        return seen

    def pairs(self, tokens: int) -> int:
        """Return how many (query, key) pairs a prompt of `tokens` tokens visits, per query head."""
        before = min(tokens, self.sinks + self.window)
        sliding = tokens - before
        return before * (before + 1) // 2 + sliding * (self.sinks + self.window)


@dataclass(frozen=True)
class AttentionKernels:
    """The kernels of a built library, where they differ those of Hopper's warpgroups or of all GPUs."""

    library: ctypes.CDLL
    on_warpgroups: bool = False

    @classmethod
    def load(cls, library: Path) -> AttentionKernels:
        """Load a library; its kernels for all GPUs are taken."""
        return cls(ctypes.CDLL(str(library)))

    @property
    def has_warpgroups(self) -> bool:
        """Whether library and GPU have kernels of warpgroups."""
        return bool(self.library.attention_has_warpgroups())

    def takes_warpgroups(self, call: Call[Attention]) -> bool:
        """Whether this call has a kernel of warpgroups here."""
        return bool(self.library.attention_takes_warpgroups(ctypes.byref(call.problem)))

    def prepare(self, call: Call[Attention]) -> Launch:
        """Bind the kernels to a call and a new output, which is poisoned."""
        return prepare(self.library, ATTENTION, call, ctypes.c_int(self.on_warpgroups))
