"""What binds calls to a built library: a library in its place says what it was told."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_attention import Attention
from gpu_calls import ATTENTION, EVICTION, Call, Operator, Sizes, prepare
from gpu_eviction import Evicting

CPU = torch.device("cpu")
SMALL = {"head_size": 32, "value_size": 16, "kv_heads": 1, "repeat": 2, "window": 8}
WORKSPACE = 48


class Library:
    """The C functions of an operator, which keep what they get; `complaint` makes them fail."""

    def __init__(self, operator: Operator, complaint: str = "") -> None:
        self.told: list[Any] = []
        self.complaint = complaint
        setattr(self, f"{operator.name}_workspace", self._workspace)
        setattr(self, f"{operator.name}_run", self._run)

    def _workspace(self, problem: Any, size: Any, message: Any, _capacity: object) -> int:
        self.told.append(problem._obj)
        size._obj.value = WORKSPACE
        message.value = self.complaint.encode()
        return bool(self.complaint)

    def _run(self, problem: Any, operands: Any, *rest: Any) -> int:
        self.told += [problem._obj, operands._obj, *rest[:-3]]
        return 0


def call_of(sizes: Sizes, batch: int, tokens: int) -> Call[Any]:
    lengths = torch.zeros(batch, dtype=torch.int32), torch.full((batch,), tokens, dtype=torch.int32)
    return Call(sizes, sizes.random_new(batch, tokens, CPU), *lengths, sizes.cache(batch, CPU))


@pytest.mark.parametrize(
    ("operator", "sizes", "choices"),
    [
        (ATTENTION, Attention(**SMALL, bits=8), (ctypes.c_int(1),)),
        (ATTENTION, Attention(**SMALL, bits=4, recent=4, angles=16), (ctypes.c_int(0),)),
        (EVICTION, Evicting(**SMALL, policy="snapkv", observe=3), ()),
    ],
    ids=["codes", "centered", "snapkv"],
)
def test_a_library_gets_every_tensor_of_a_call(
    monkeypatch: pytest.MonkeyPatch, operator: Operator, sizes: Sizes, choices: tuple[object, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    call, library = call_of(sizes, 2, 3), Library(operator)
    launch = prepare(library, operator, call, *choices)
    assert launch.output.shape == (2, 2, 3, 16)
    assert launch.output.isnan().all(), "what the kernels leave out is seen"
    launch.run()
    planned, problem, operands, *rest = library.told
    assert rest == [*choices]
    assert bytes(planned) == bytes(problem) == bytes(sizes.problem(2, 3))
    for name, tensor in (call.new | call.others).items():
        assert getattr(operands, name) == tensor.data_ptr(), name
    assert operands.output == launch.output.data_ptr()
    assert operands.past_length == call.past_length.data_ptr()
    assert operands.new_length == call.new_length.data_ptr()
    assert operands.workspace and operands.decay
    held = [call.cache[name].data_ptr() if name in call.cache else None for name in operator.cache]
    assert list(operands.cache) == list(operands.present) == held


def test_what_a_library_refuses_is_said() -> None:
    library = Library(EVICTION, "window is 0, a query sees at least itself")
    with pytest.raises(RuntimeError, match="window is 0, a query sees at least itself"):
        prepare(library, EVICTION, call_of(Evicting(**SMALL), 1, 1))


@pytest.mark.parametrize("sizes", [Attention(), Evicting()], ids=["attention", "eviction"])
def test_the_usual_sizes_are_those_of_an_8b_model(sizes: Sizes) -> None:
    problem = sizes.problem(4, 1)
    assert (problem.batch, problem.tokens, problem.query_heads, problem.kv_heads) == (4, 1, 32, 8)
    assert (problem.head_size, problem.sinks + problem.window) == (128, 4096)
    assert problem.scale == pytest.approx(128**-0.5)
