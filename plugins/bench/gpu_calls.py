"""Binds calls of attention operators on PyTorch tensors to the kernels of a built library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from c_calls import call
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


def prepare(
    library: ctypes.CDLL,
    operator: Operator,
    problem: AttentionProblem | EvictionProblem,
    tensors: Tensors,
    cache: Tensors,
    *choices: object,
) -> Launch:
    """Bind the kernels to a call's tensors and a new output, which is poisoned.

    Args:
        library: the built library.
        operator: what is called.
        problem: its sizes.
        tensors: its operands by name, without output and workspace.
        cache: its cache by name, which it updates.
        choices: what the function is told besides.

    """
    query = tensors["query"]
    size = ctypes.c_size_t()
    call(getattr(library, f"{operator.name}_workspace"), ctypes.byref(problem), ctypes.byref(size))
    shape = (*query.shape[:3], problem.value_size)
    output = torch.full(shape, torch.nan, dtype=query.dtype, device=query.device)
    workspace = torch.empty(max(size.value, 1), dtype=torch.uint8, device=query.device)
    plain = tensors | {"output": output, "workspace": workspace}
    run = partial(call, getattr(library, f"{operator.name}_run"), ctypes.byref(problem))
    return Launch(output, partial(_launch, run, operator, plain, cache, choices))


def _launch(
    run: Callable[..., None],
    operator: Operator,
    plain: Tensors,
    cache: Tensors,
    choices: tuple[object, ...],
) -> None:
    operands = operator.operands(**{name: tensor.data_ptr() for name, tensor in plain.items()})
    for i, name in enumerate(operator.cache):
        operands.cache[i] = operands.present[i] = cache[name].data_ptr() if name in cache else None
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    run(ctypes.byref(operands), *choices, stream)
