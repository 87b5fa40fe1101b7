"""Asking the plugin library which nodes its kernels take: the same limits as in a build, in the same words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from driver import Host

from rotexport.errors import TargetError
from rotexport.plugins.judging import NodeInput, Question, judge

HALF, FLOAT, INT8 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.int8)


@pytest.fixture(scope="module")
def library(host: Host, emulated: Path) -> Path:
    """Return the real plugin library, over the emulator; `host` skips where it could not be built."""
    assert host.creators()
    return next(emulated.glob("librotexport_plugins_trt*.so"))


def tensor(dtype: np.dtype, *shape: int, largest: tuple[int, ...] | None = None) -> NodeInput:
    return NodeInput(onnx.helper.np_dtype_to_tensor_dtype(dtype), shape, largest or shape)


def hadamard(length: int, dtype: np.dtype = HALF) -> Question:
    square = (tensor(INT8, 1, 1), tensor(INT8, 1, 1), tensor(INT8, length, length))
    return Question(
        "FastHadamard",
        {},
        (tensor(dtype, 1, 1, length, largest=(4, 512, length)), tensor(dtype, length), *square),
    )


def attention(
    head: int = 64, window: int = 32, groups: int = 1, dtype: np.dtype = HALF, form: str = "Int4"
) -> Question:
    """A cache of codes, two key heads and four query heads, batch 1 to 4, 1 to 512 tokens."""

    def fresh(heads: int) -> NodeInput:
        return tensor(dtype, 1, heads, 1, head, largest=(4, heads, 512, head))

    def held(kind: np.dtype, *shape: int) -> NodeInput:
        return tensor(kind, 1, 2, *shape, largest=(4, 2, *shape))

    lengths = [tensor(np.dtype(np.int32), 1, largest=(4,))] * 2
    numbers = {"sinks": 4, "window": window, "query_heads": 4, "kv_heads": 2}
    numbers |= {"head_size": head, "value_size": head, "scale": 0.125, "softcap": 0.0}
    inputs = [tensor(np.dtype(np.int64), 1, 1, largest=(4, 512)), fresh(4), fresh(4), fresh(2), fresh(2)]
    inputs += [*lengths, tensor(FLOAT, 4), *[held(dtype, 4, head)] * 2]
    codes, scales = (head // 2, 2) if form == "Int4" else (head, 1)
    inputs += [*[held(INT8, window, codes)] * 2, *[held(dtype, window, groups, scales)] * 2]
    return Question(f"SinkWindowAttention{form}", numbers, tuple(inputs))


def linear(inputs: int = 128, group: int = 128, **numbers: int) -> Question:
    rows = (tensor(INT8, 1, 1, inputs, largest=(4, 512, inputs)), tensor(FLOAT, 1, 1, 1, largest=(4, 512, 1)))
    weight = (tensor(INT8, 64, group), tensor(FLOAT, 1, 64), tensor(FLOAT, 64))
    return Question("QuantizedLinearW8A8", {"group": group, "out_type": 10} | numbers, (*rows, *weight))


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TAKEN = [hadamard(64), hadamard(4096, FLOAT), attention(), attention(80, dtype=BFLOAT16), linear()]
TAKEN += [attention(form="Fp8"), attention(256, groups=2, dtype=BFLOAT16, form="Fp8")]


def test_what_the_kernels_take_is_taken(library: Path) -> None:
    assert judge(library, TAKEN) == [None] * len(TAKEN)


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (attention(dtype=FLOAT), "input 'query' must be float16 or bfloat16"),
        (
            attention(head=72),
            "SinkWindowAttention: head_size is 72, the kernel needs a multiple of 16 up to 256",
        ),
        (
            attention(head=288),
            "SinkWindowAttention: head_size is 288, the kernel needs a multiple of 16 up to 256",
        ),
        (
            attention(groups=8),
            "8 groups of a key head of 64 channels: the kernel needs groups of a multiple of 16",
        ),
        (attention(head=128, groups=8), "16 groups of a head's keys and values take more than 99 KB"),
        (
            attention(head=128, groups=16, form="Fp8"),
            "16 groups of a key head of 128 channels: the kernel needs groups of",
        ),
        (hadamard(65536), "65536"),
        (linear(120), "120"),
        (linear(group=48), "field 'group' is 48, must be a multiple of 32"),
        (replace(linear(), numbers={"group": 128}), "field 'out_type' is missing"),
        (replace(hadamard(64), operator="Unheard"), "the library has no such plugin"),
    ],
)
def test_what_the_kernels_refuse_is_refused_in_their_words(
    library: Path, question: Question, reason: str
) -> None:
    """Beside it another node, which is taken all the same."""
    refused, taken = judge(library, [question, TAKEN[0]])
    assert refused is not None and reason in refused and not refused.startswith("rotexport")
    assert taken is None


def test_an_input_of_another_type_is_refused(library: Path) -> None:
    question = attention()
    inputs = list(question.inputs)
    inputs[5] = replace(inputs[5], dtype=onnx.TensorProto.INT64)
    (reason,) = judge(library, [replace(question, inputs=tuple(inputs))])
    assert reason == "its kernel has no form for the type of input 5"
    inputs[5] = replace(inputs[5], dtype=onnx.TensorProto.STRING)
    (reason,) = judge(library, [replace(question, inputs=tuple(inputs))])
    assert reason is not None and "TensorRT has no tensors of type 8" in reason


def test_a_library_that_cannot_be_asked_is_an_error(tmp_path: Path, emulated: Path) -> None:
    """One that does not load, and one that was built before it could be asked."""
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    for library in (broken, emulated / "librotexport_planted_bugs.so"):
        with pytest.raises(TargetError, match=r"cannot be asked what its kernels take: .*; build it again"):
            judge(library, TAKEN[:1])
