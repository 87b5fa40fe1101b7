"""The GPU script of sink/window attention: its judgement, tried on the CPU with the emulator in the GPU's place."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import attention as bench
import attention_targets as targets
import emulated_attention
import ml_dtypes
import numpy as np
import pytest
import torch
from emulated_attention import EmulatedAttention
from gpu_attention import Attention
from gpu_calls import Call, Launch
from structures import NEW

from rotexport.streaming.oracle import visible

CPU = torch.device("cpu")
SMALL = Attention(64, 64, kv_heads=1, repeat=2, window=128)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy()


class OnEmulator:
    """Kernels as the script calls them. `spoil` changes an output after the kernel has run."""

    def __init__(self, emulated: Path, spoil: float = 0.0) -> None:
        self.kernels = EmulatedAttention(emulated / "librotexport_emulated_kernels.so")
        self.spoil = spoil

    def prepare(self, call: Call[Attention]) -> Launch:
        arrays = {name: to_numpy(tensor) for name, tensor in (call.new | call.others).items()}
        lengths = (
            to_numpy(call.past_length),
            to_numpy(call.new_length),
            to_numpy(call.sizes.slopes(CPU)),
        )
        cache = {name: to_numpy(tensor) for name, tensor in call.cache.items()}
        output, updated = self.kernels.run(
            call.problem,
            emulated_attention.Call(*(arrays.pop(name) for name in NEW), *lengths, cache, arrays),
        )
        for name, content in updated.items():
            call.cache[name] = torch.from_numpy(content.astype(np.float32)).to(call.cache[name].dtype)
        output[0, -1, 0, 0] += np.asarray(self.spoil, output.dtype)
        return Launch(torch.from_numpy(output.astype(np.float32)), lambda: None)


@pytest.mark.parametrize(
    "attention",
    [
        SMALL,
        replace(SMALL, bits=8, dtype=torch.bfloat16),
        replace(SMALL, bits=4, recent=32, softcap=5.0, decay=0.02, group=16),
        replace(SMALL, bits=2, recent=32, angles=48),
        replace(SMALL, bits=4, rotated=True),
        replace(SMALL, bits=8, angles=64, rotated=True),
        replace(SMALL, bits=8, fp8=True, softcap=5.0, decay=0.02, group=16),
    ],
    ids=lambda attention: attention.form,
)
def test_check_accepts_what_is_right(emulated: Path, attention: Attention) -> None:
    torch.manual_seed(0)
    assert bench.check(OnEmulator(emulated), attention, CPU) <= 1


@pytest.mark.parametrize("spoil", [0.05, float("nan")])
def test_check_rejects_what_is_wrong(emulated: Path, spoil: float) -> None:
    assert not bench.check(OnEmulator(emulated, spoil), SMALL, CPU) <= 1


@pytest.mark.parametrize(("sinks", "window", "tokens"), [(4, 10, 9), (4, 10, 14), (4, 10, 40), (0, 1, 5)])
def test_visited_pairs_are_those_of_the_mask(sinks: int, window: int, tokens: int) -> None:
    counted = int(visible(tokens, sinks, window).sum())
    assert Attention(sinks=sinks, window=window).pairs(tokens) == counted


def test_bytes_that_decoding_must_read() -> None:
    """Codes of keys and values, a scale and a minimum each, and four sinks."""
    expected = 64 * 8 * (4092 * (2 * 64 + 2 * 4) + 4 * 2 * 256)
    assert replace(Attention(), bits=4).cache_bytes_read(64) == expected
    numbers = 64 * 8 * (4092 * (2 * 128 + 2 * 2) + 4 * 2 * 256)  # of fp8, which have no minimum
    assert replace(Attention(), bits=8, fp8=True).cache_bytes_read(64) == numbers


def test_every_head_size_and_format_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_prefill", lambda _, a, tokens: [("prefill", a.head_size, a.form)])
    monkeypatch.setattr(bench, "measure_decode", lambda _, a, batch: ("decode", a.head_size, a.form))
    measured = set(bench.measure(None))
    forms = ["float", "fp8", *(f"int{b}{recent}" for b in (8, 4, 2) for recent in ("", ", 32 recent"))]
    for way, head, form in itertools.product(("prefill", "decode"), (64, 80, 96, 128, 256), forms):
        assert (way, head, form) in measured


def results(**changed: float) -> list[targets.Result]:
    """What reaches every target, but for the seconds that are changed."""
    seconds = {"short": 1.0, "long": 4.2, "float": 1.0, "int8": 1.0, "int4": 1.0, "one": 1.0}
    seconds |= {"warp short": 0.5, "warp long": 2.1, "flex": 1.0, "cudnn long": 60.0} | changed
    prompts = Attention(window=4096)
    causal = targets.SHORT * (targets.SHORT + 1) / 2
    of_rate = causal / prompts.pairs(targets.SHORT)
    flash = 0.86 * of_rate  # so the kernel's rate is 0.86 of the flash backend's
    cudnn = {"short": 0.66 / 2 * of_rate, "long": seconds["cudnn long"]}  # and on warpgroups 0.66 of cuDNN's
    made = []
    for name, tokens in (("short", targets.SHORT), ("long", targets.LONG)):
        others = {"flash": flash if name == "short" else 99.0, "cudnn": cudnn[name], "flex": seconds["flex"]}
        for where, kernel in (("", seconds[name]), (targets.WARPGROUPS, seconds[f"warp {name}"])):
            case = f"prefill {tokens}, head 128{where}"
            made.append(targets.Result(case, "float", prompts.pairs(tokens), {"kernel": kernel} | others))
    copied = {"float": 0.81, "int8": 0.71, "int4": 0.61}
    made += [
        targets.Result(
            "decode 64, head 128",
            form,
            int(share * 2 * targets.COPY_BYTES),
            {"kernel": seconds[form], "copy": 1.0},
        )
        for form, share in copied.items()
    ]
    one = targets.Result("decode 1, head 128", "float", 1, {"kernel": seconds["one"], "sdpa": 0.7})
    return [*made, one]


def test_shortfalls_name_what_is_slow() -> None:
    assert not list(targets.shortfalls(results()))
    slow = list(targets.shortfalls(results(short=1.1, int8=1.1, one=1.2)))
    assert slow == [
        "prefill 32768, head 128: 0.78 of the flash backend's rate, must be 0.85",
        "decode 64, head 128, int8: 0.65 of the copy, must be 0.70",
        "decode 1, head 128: 1.71 times as long as SDPA, must be 1.5",
    ]
    assert list(targets.shortfalls(results(long=5.0))) == [
        "prefill 131072, head 128: 5.00 times as long as 32768 tokens, must be 4.2 within 10 %"
    ]


def test_shortfalls_name_what_is_slow_on_warpgroups() -> None:
    slow = list(
        targets.shortfalls(results(**{"warp short": 0.6, "warp long": 4.0, "flex": 0.55, "cudnn long": 20}))
    )
    assert slow == [
        "prefill 32768, head 128, warpgroups: 0.55 of the cudnn backend's rate, must be 0.65",
        "prefill 32768, head 128, warpgroups: 0.92 times as fast as FlexAttention, must be faster",
        "prefill 32768, head 128, warpgroups: 2.34 times as fast as full causal attention, must be 2.5",
        "prefill 131072, head 128, warpgroups: 5.00 times as fast as full causal attention, must be 9.0",
        "prefill 131072, head 128, warpgroups: 6.67 times as long as 32768 tokens, must be 4.2 within 10 %",
    ]


def test_what_did_not_run_is_a_shortfall() -> None:
    """A missing backend is no success; without warpgroups nothing is asked of them."""
    without = [replace(r, seconds={k: v for k, v in r.seconds.items() if k != "cudnn"}) for r in results()]
    assert [line for line in targets.shortfalls(without) if "cudnn" in line] == [
        "prefill 32768, head 128, warpgroups: nan of the cudnn backend's rate, must be 0.65"
    ]
    portable = [result for result in without if not result.name.endswith(targets.WARPGROUPS)]
    assert not list(targets.shortfalls(portable))


def test_the_table_has_a_line_per_result() -> None:
    lines = targets.table(results()).splitlines()
    assert len(lines) == 2 + len(results())
    assert lines[2] == "| prefill 32768, head 128 | float | 1000000.0 |  | 3.67 | 1.41 | 1.00 |  |"
