"""The GPU script of attention that chooses what stays: its judgement, tried on the CPU with the emulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import emulated_attention
import eviction as bench
import ml_dtypes
import numpy as np
import pytest
import torch
from emulated_eviction import EmulatedEviction
from gpu_calls import Call, Launch
from gpu_eviction import Evicting

CPU = torch.device("cpu")
SMALL = Evicting(
    head_size=64, value_size=64, kv_heads=1, repeat=2, sinks=2, window=70, recent=9, context=200, forget=0.98
)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy()


class OnEmulator:
    """Kernels as the script calls them. `spoil` changes what they leave."""

    def __init__(self, emulated: Path, spoil: str = "") -> None:
        self.kernels = EmulatedEviction(emulated / "librotexport_emulated_kernels.so")
        self.spoil = spoil

    def prepare(self, call: Call[Evicting]) -> Launch:
        arrays = {name: to_numpy(tensor) for name, tensor in call.new.items()}
        lengths = (to_numpy(call.past_length), to_numpy(call.new_length), to_numpy(call.sizes.slopes(CPU)))
        cache = {name: to_numpy(tensor) for name, tensor in call.cache.items()}
        output, updated = self.kernels.run(
            call.problem, emulated_attention.Call(*arrays.values(), *lengths, cache)
        )
        if self.spoil == "output":
            output[0, -1, 0, 0] += np.asarray(0.05, output.dtype)
        if self.spoil == "score":
            updated["window_score"][0, 0, 3] *= 1.001
        if self.spoil == "slot":
            updated["window_key"][0, 0, 3, 5] += np.asarray(0.01, output.dtype)
        if self.spoil == "order":
            for name in updated.keys() - {"sink_key", "sink_value"}:
                updated[name][0, 0, [3, 4]] = updated[name][0, 0, [4, 3]]
        for name, content in updated.items():
            wide = content if content.dtype == np.int32 else content.astype(np.float32)
            call.cache[name] = torch.from_numpy(wide).to(call.cache[name].dtype)
        return Launch(torch.from_numpy(output.astype(np.float32)), lambda: None)


@pytest.mark.parametrize(
    "evicting",
    [
        SMALL,
        replace(SMALL, policy="snapkv", softcap=5.0, dtype=torch.bfloat16),
        replace(SMALL, decay=0.02, context=90),
    ],
    ids=["heavy-hitter", "snapkv", "short context"],
)
def test_check_accepts_what_is_right(emulated: Path, evicting: Evicting) -> None:
    torch.manual_seed(0)
    assert bench.check(OnEmulator(emulated), evicting, CPU) <= 1


@pytest.mark.parametrize("spoil", ["output", "score", "slot", "order"])
def test_check_rejects_what_is_wrong(emulated: Path, spoil: str) -> None:
    torch.manual_seed(0)
    assert not bench.check(OnEmulator(emulated, spoil), SMALL, CPU) <= 1


def test_another_choice_is_as_wrong_as_what_it_loses() -> None:
    """Of five tokens one is recent and four compete for two slots."""
    evicting = replace(SMALL, window=3, recent=1)
    positions, worth = torch.tensor([9, 8, 7, 6, 5]), torch.tensor([0.0, 1.0, 4.0, 2.0, 3.0]).double()
    empty = torch.empty(0)
    every = bench.Expected(empty, positions, empty, empty, worth, worth)

    def error(*kept: int) -> float:
        return bench.selection_error(evicting, 10, torch.tensor(kept), every)

    assert error(9, 7, 5) == 0
    assert error(9, 7, 6) == pytest.approx(0.5)
    assert error(8, 7, 5) == float("inf"), "recent tokens stay"
    assert error(9, 7) == float("inf"), "slots are used"
    assert error(9, 7, 4) == float("inf"), "what went before stays away"


def test_the_table_has_a_line_per_result() -> None:
    results = [
        bench.Result("heavy-hitter, prompt of 8192", {"kernel": 3e-3, "flash": 2e-3}),
        bench.Result("snapkv, a token for 1", {"kernel": 4e-5, "copy": 2e-5}),
    ]
    assert bench.table(results).splitlines()[2:] == [
        "| heavy-hitter, prompt of 8192 | 3000.0 | 1.50 |  |",
        "| snapkv, a token for 1 | 40.0 |  | 2.00 |",
    ]
