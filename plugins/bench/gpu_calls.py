"""Calls of attention operators on PyTorch tensors, and what binds them to the kernels of a built library."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import torch
from c_calls import call as call_function
from structures import (
    ATTENTION_CACHE,
    EVICTION_CACHE,
    AttentionOperands,
    AttentionProblem,
    EvictionOperands,
    EvictionProblem,
)

TYPES = {torch.float16: 0, torch.bfloat16: 1}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes(ABC):
    """Sizes and numbers that all operators have."""

    head_size: int = 128
    value_size: int = 128
    kv_heads: int = 8
    repeat: int = 4
    sinks: int = 4
    window: int = 4092
    softcap: float = 0.0
    decay: float = 0.0
    dtype: torch.dtype = torch.float16

    @abstractmethod
    def problem(self, batch: int, tokens: int) -> AttentionProblem | EvictionProblem:
        """Return what the kernels are told of a call's sizes."""

    @property
    def query_heads(self) -> int:
        """Query heads in all."""
        return self.kv_heads * self.repeat

    @property
    def scale(self) -> float:
        """The usual factor of logits."""
        return self.head_size**-0.5

    @property
    def heads(self) -> dict[str, tuple[int, int]]:
        """Heads of each tensor that a call brings, and their size."""
        query, key = (self.query_heads, self.head_size), (self.kv_heads, self.head_size)
        return {"query": query, "query_sink": query, "key": key, "value": (self.kv_heads, self.value_size)}

    def slopes(self, device: torch.device) -> torch.Tensor:
        """Return the decay of each query head, none for the first."""
        return self.decay * torch.linspace(0, 1, self.query_heads, device=device)

    def numbers(self, batch: int, tokens: int) -> tuple[float, ...]:
        """Return what the kernels of all operators are told."""
        return (
            *(TYPES[self.dtype], batch, tokens, self.query_heads, self.kv_heads),
            *(self.head_size, self.value_size, self.sinks, self.window, self.scale, self.softcap),
        )

    def random_new(self, batch: int, tokens: int, device: torch.device) -> Tensors:
        """Return random tensors [batch, heads, tokens, size] that a call brings."""
        return {
            name: torch.randn(batch, heads, tokens, size, device=device, dtype=self.dtype)
            for name, (heads, size) in self.heads.items()
        }


S = TypeVar("S", bound=Sizes)


@dataclass(frozen=True)
class Call(Generic[S]):
    """One call: new tensors [B, heads, S, size], lengths [B], and the cache, which it updates.

    `others` are what only some operators take.
    """

    sizes: S
    new: Tensors
    past_length: torch.Tensor
    new_length: torch.Tensor
    cache: Tensors
    others: Tensors = field(default_factory=dict)

    @property
    def problem(self) -> AttentionProblem | EvictionProblem:
        """What the kernels are told of sizes."""
        batch, _, tokens, _ = self.new["query"].shape
        return self.sizes.problem(batch, tokens)


@dataclass(frozen=True)
class Operator:
    """The C functions `{name}_workspace` and `{name}_run`, and what they take."""

    name: str
    operands: type[AttentionOperands] | type[EvictionOperands]
    cache: tuple[str, ...]


ATTENTION = Operator("attention", AttentionOperands, ATTENTION_CACHE)
EVICTION = Operator("eviction", EvictionOperands, EVICTION_CACHE)


@dataclass(frozen=True)
class Launch:
    """A call bound to its operands: `run` fills `output` and updates the cache."""

    output: torch.Tensor
    run: Callable[[], None]


def prepare(library: ctypes.CDLL, operator: Operator, call: Call[S], *choices: object) -> Launch:
    """Bind the kernels to a call and a new output, which is poisoned.

    Args:
        library: the built library.
        operator: what is called.
        call: its operands.
        choices: what the function is told besides.

    """
    query, problem, size = call.new["query"], call.problem, ctypes.c_size_t()
    workspace_of, run = (getattr(library, f"{operator.name}_{what}") for what in ("workspace", "run"))
    call_function(workspace_of, ctypes.byref(problem), ctypes.byref(size))
    shape = (*query.shape[:3], call.sizes.value_size)
    tensors = call.new | call.others
    tensors |= {"past_length": call.past_length, "new_length": call.new_length}
    tensors |= {"decay": call.sizes.slopes(query.device)}
    tensors |= {"output": torch.full(shape, torch.nan, dtype=query.dtype, device=query.device)}
    tensors |= {"workspace": torch.empty(max(size.value, 1), dtype=torch.uint8, device=query.device)}
    bound = partial(call_function, run, ctypes.byref(problem))
    return Launch(tensors["output"], partial(_launch, bound, operator, tensors, call.cache, choices))


def _launch(
    run: Callable[..., None],
    operator: Operator,
    tensors: Tensors,
    cache: Tensors,
    choices: tuple[object, ...],
) -> None:
    operands = operator.operands(**{name: tensor.data_ptr() for name, tensor in tensors.items()})
    for i, name in enumerate(operator.cache):
        operands.cache[i] = operands.present[i] = cache[name].data_ptr() if name in cache else None
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    run(ctypes.byref(operands), *choices, stream)
