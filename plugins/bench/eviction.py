"""Checks and measures attention that chooses what stays, on the GPU of this machine (run.sh sets all up).

Correctness: random ragged calls through the cache, poisoned outputs; each call is compared in float64 with
what the operator makes of the cache that the kernels left before: outputs and scores within the bounds of
kernels/eviction.h, what stays up to tokens whose score times norm is as close, slots bit for bit. Speed:
medians over CUDA events; prompts beside the flash backend of PyTorch's SDPA under a causal mask, a new token
for each row beside a device-to-device copy that moves as many bytes as the cache holds. Writes
bench/results/GPU-DATE-eviction.json. Exit status 1 when a result is wrong; no speed is asked for.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from gpu_calls import Call
from gpu_eviction import Evicting, EvictionKernels, Expected, expected
from measuring import EPSILON, Benchmark, median_seconds
from structures import POLICIES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (112, 48)]
CALLS = [(300, 30), (3, 16), (1, 0), (1, 1), (97, 280)]  # new tokens of two rows
SCORE_ERROR = 2.0**-17 * 33  # for logits of at most 32
PROMPTS = (8192, 32768)


@dataclass(frozen=True)
class Result:
    """Median seconds of one case, and of what it is compared with."""

    name: str
    seconds: dict[str, float]


def selection_error(evicting: Evicting, end: int, kept: torch.Tensor, every: Expected) -> float:
    """Return by how much what stays misses the best, of the worst that stays; infinity if it may not stay."""
    if not torch.isin(kept, every.positions).all() or len(kept) != min(evicting.window, len(every.positions)):
        return float("inf")
    stays = torch.isin(every.positions, kept)
    recent = end - every.positions <= evicting.recent
    if not bool(stays[recent].all()) or bool(stays.all()):
        return 0.0 if bool(stays[recent].all()) else float("inf")
    if not bool((stays & ~recent).any()):
        return 0.0
    worst, best = every.worth[stays & ~recent].min(), every.worth[~stays].max()
    return max(float((best - worst) / worst.clamp(min=1e-30)), 0.0)


def slot_error(call: Call[Evicting], row: int, head: int, every: Expected) -> float:
    """Return the largest error of what slots hold, as a fraction of what is allowed."""
    end = int(call.past_length[row] + call.new_length[row])
    slots = {name: tensor[row, head] for name, tensor in call.cache.items()}
    counts = slots["window_position"].long()
    held = counts > 0
    kept = counts[held] - 1
    choice = selection_error(call.sizes, end, kept, every)
    if choice == float("inf") or bool((kept.diff() >= 0).any()):
        return float("inf")
    index = (every.positions == kept[:, None]).int().argmax(1)
    for kind, tokens in (("key", every.keys), ("value", every.values)):
        if not torch.equal(slots[f"window_{kind}"][held], tokens[index]) or bool(
            slots[f"window_{kind}"][~held].any()
        ):
            return float("inf")
    exact = every.scores[index]
    error = ((slots["window_score"][held].double() - exact).abs() / (exact + 1e-6)).max()
    return max(float(error) / SCORE_ERROR, choice / (2 * SCORE_ERROR))


def check(kernels: EvictionKernels, evicting: Evicting, device: torch.device) -> float:
    """Return the largest error as a fraction of the allowed one; above 1, or NaN, is wrong."""
    past = torch.zeros(len(CALLS[0]), dtype=torch.int32, device=device)
    cache = evicting.cache(len(past), device)
    worst = 0.0
    for counts in CALLS:
        new = evicting.random_new(len(counts), max(counts), device)
        for row, count in enumerate(counts):
            for tensor in new.values():
                tensor[row, :, count:] = torch.nan
        count = torch.tensor(counts, dtype=torch.int32, device=device)
        call = Call(evicting, new, past.clone(), count, cache)
        rows = [
            [expected(call, row, head) for head in range(evicting.kv_heads)] for row in range(len(counts))
        ]
        allowed = (3 * EPSILON[evicting.dtype] + 2.0**-18 * 33) * float(
            max(new["value"].nan_to_num().abs().max(), cache["window_value"].abs().max())
        )
        launch = kernels.prepare(call)
        launch.run()
        for row, n in enumerate(counts):
            if bool((launch.output[row, :, n:] != 0).any()):
                return float("inf")
            found = launch.output[row, :, :n].double().unflatten(0, (evicting.kv_heads, -1))
            for head, every in enumerate(rows[row]):
                errors = [slot_error(call, row, head, every)]
                if n:
                    errors.append(float((found[head] - every.output).abs().max()) / allowed)
                if any(math.isnan(error) for error in errors):
                    return float("nan")
                worst = max(worst, *errors)
        past += count
    return worst


def check_all(kernels: EvictionKernels) -> list[str]:
    """Return what is wrong."""
    wrong, checked = [], 0
    for sizes, policy, dtype in itertools.product(SIZES, POLICIES, (torch.float16, torch.bfloat16)):
        evicting = Evicting(
            *(*sizes, 2, 3),
            window=128,
            dtype=dtype,
            policy=policy,
            recent=24,
            context=400,
            forget=0.99,
        )
        for one in (evicting, replace(evicting, softcap=5.0, decay=0.02)):
            error = check(kernels, one, torch.device("cuda"))
            checked += 1
            if not error <= 1:
                wrong.append(f"{one}: {error:.3g} times the allowed error")
    print(f"{checked} configurations checked, {len(wrong)} wrong")
    return wrong


def measure_prompt(kernels: EvictionKernels, evicting: Evicting, tokens: int) -> Result:
    """Measure one prompt, and full causal attention over it."""
    device = torch.device("cuda")
    new = evicting.random_new(1, tokens, device)
    lengths = (torch.zeros(1, device=device).int(), torch.full((1,), tokens, device=device).int())
    launch = kernels.prepare(Call(evicting, new, *lengths, evicting.cache(1, device)))
    seconds = {"kernel": median_seconds([launch.run])}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        tensors = (new[n] for n in ("query", "key", "value"))
        causal = partial(scaled_dot_product_attention, *tensors, is_causal=True, enable_gqa=True)
        seconds["flash"] = median_seconds([causal])
    return Result(f"{evicting.policy}, prompt of {tokens}", seconds)


def measure_token(kernels: EvictionKernels, evicting: Evicting, batch: int) -> Result:
    """Measure a new token for each row over a full cache, again and again; all scores are alike at first."""
    device = torch.device("cuda")
    new = evicting.random_new(batch, 1, device)
    lengths = (torch.full((batch,), 50_000, device=device).int(), torch.ones(batch, device=device).int())
    cache = evicting.cache(batch, device)
    for name in ("sink_key", "sink_value", "window_key", "window_value"):
        cache[name].normal_()
    newest = torch.arange(50_000, 50_000 - evicting.window, -1, device=device)
    cache["window_position"].copy_(newest.int().expand_as(cache["window_position"]))
    cache["window_score"].uniform_()
    seconds = {"kernel": median_seconds([kernels.prepare(Call(evicting, new, *lengths, cache)).run])}
    source = torch.empty(evicting.cache_bytes(batch) // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds["copy"] = median_seconds([partial(target.copy_, source)])
    return Result(f"{evicting.policy}, a token for {batch}", seconds)


def measure(kernels: EvictionKernels) -> Iterator[Result]:
    """Measure prompts and single tokens under both policies."""
    for policy in POLICIES:
        evicting = Evicting(policy=policy)
        for tokens in PROMPTS:
            yield measure_prompt(kernels, evicting, tokens)
        for batch in (64, 1):
            yield measure_token(kernels, evicting, batch)


def table(results: list[Result]) -> str:
    """Return the results as the Markdown table of plugins/README.md."""
    lines = ["| case | us | times flash | times copy |", "|---|---|---|---|"]
    for result in results:
        kernel = result.seconds["kernel"]
        ratios = (
            f"{kernel / result.seconds[o]:.2f}" if o in result.seconds else "" for o in ("flash", "copy")
        )
        lines.append(f"| {result.name} | {kernel * 1e6:.1f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


BENCHMARK = Benchmark(
    script=__file__,
    name="eviction",
    check=lambda library: check_all(EvictionKernels(library)),
    measure=lambda library: measure(EvictionKernels(library)),
    table=table,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main(__doc__))
