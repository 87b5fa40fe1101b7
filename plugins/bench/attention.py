"""Checks and measures sink/window attention on the GPU of this machine (run.sh sets everything up).

Correctness: random ragged streams, call by call through the cache, poisoned outputs, float64 references, the
error bound of kernels/attention.h; what a call stores is checked by the calls that read it. Speed: medians
over CUDA events. Prefill, on Hopper twice, on warpgroups and as elsewhere, is compared by visited (query,
key) pairs per second with PyTorch's SDPA, its flash and its cuDNN backend under a causal mask, and in time
with them and with FlexAttention under the same mask; decoding by the bytes that it must read with a copy from
device to device, and with SDPA over as many keys. All in one run. Writes
bench/results/GPU-DATE-attention.json. Exit status 1 when a result is wrong, 2 when one is slower than it must
be.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from attention_streams import definition_row, random_new, random_turns, special_inputs, special_noise
from attention_targets import COPY_BYTES, LONG, MANY_ROWS, SHORT, WARPGROUPS, Result, shortfalls, table
from gpu_attention import Attention, AttentionKernels
from gpu_calls import Call
from measuring import EPSILON, Benchmark, median_seconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

WARPGROUP_SIZES = [(64, 64), (128, 128), (112, 48), (48, 64)]
SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (112, 48)]
FP8: dict[str, Any] = {"bits": 8, "fp8": True}
WHOLE_WINDOWS: list[dict[str, Any]] = [{}, {"bits": 8}, {"bits": 4}, {"bits": 2}, FP8]
FORMATS = [*WHOLE_WINDOWS, *({"bits": bits, "recent": 32} for bits in (8, 4, 2))]
LARGEST_HEAD = 256  # with the angles of its mean
CALLS = [(200, 30), (3, 16), (1, 0), (97, 180)]  # new tokens of two rows
LONG_CALLS = [(700, 130), (3, 16), (400, 900)]  # over tiles enough for warpgroups to copy ahead


def check(
    kernels: AttentionKernels,
    attention: Attention,
    device: torch.device,
    calls: Sequence[tuple[int, int]] = CALLS,
) -> float:
    """Return the largest error as a fraction of the allowed one; above 1, or NaN, is wrong."""
    lengths = [sum(row) for row in zip(*calls, strict=True)]
    streams = random_new(attention, len(lengths), max(lengths), device)
    rows = [{name: t[b, :, :length] for name, t in streams.items()} for b, length in enumerate(lengths)]
    turns = random_turns(attention, len(lengths), max(lengths), device)
    told = [definition_row(attention, streams, turns, b, length) for b, length in enumerate(lengths)]
    expected = [attention.expected(row) for row in told]
    allowed = (3 * EPSILON[attention.dtype] + 2.0**-18 * 33) * float(streams["value"].abs().max())
    past = torch.zeros(len(lengths), dtype=torch.int32)
    cache = attention.cache(len(lengths), device)
    worst = 0.0
    for counts in calls:
        new = {name: torch.full_like(t[:, :, : max(counts)], torch.nan) for name, t in streams.items()}
        for b, (p, n) in enumerate(zip(past.tolist(), counts, strict=True)):
            for name, tensor in new.items():
                tensor[b, :, :n] = rows[b][name][:, p : p + n]
        count = torch.tensor(counts, dtype=torch.int32)
        special = special_inputs(attention, turns, past.tolist(), max(counts), device)
        launch = kernels.prepare(Call(attention, new, past.to(device), count.to(device), cache, special))
        launch.run()
        for b, (p, n) in enumerate(zip(past.tolist(), counts, strict=True)):
            if n:
                error = (launch.output[b, :, :n].double() - expected[b][:, p : p + n]).abs().max()
                worst = max(worst, float(error) / allowed) if not error.isnan() else float("nan")
            if bool((launch.output[b, :, n:] != 0).any()):
                return float("inf")
        past += count
    return worst


def cases(sizes: Sequence[tuple[int, int]], window: int) -> Iterator[Attention]:
    """Return every size, format and type, plain, with all else that logits take, centered and rotated."""
    for (head, value), kept, dtype in itertools.product(sizes, FORMATS, (torch.float16, torch.bfloat16)):
        one = Attention(head, value, kv_heads=2, repeat=3, window=window, dtype=dtype, **kept)
        yield one
        yield replace(one, softcap=5.0, decay=0.02, group=16 if one.bits else None)
        if one.bits and not one.fp8:
            if 2 * head <= LARGEST_HEAD:
                yield replace(one, angles=head)
            if head & (head - 1) == 0:
                yield replace(one, rotated=True)


def check_all(kernels: AttentionKernels) -> list[str]:
    """Return what is wrong: on warpgroups first, which nothing but a GPU runs as they are."""
    device = torch.device("cuda")
    rounds = [("", kernels, cases(SIZES, 128), CALLS)]
    if kernels.has_warpgroups:
        on_warpgroups = replace(kernels, on_warpgroups=True)
        for window, calls in ((600, LONG_CALLS), (128, CALLS)):
            rounds.insert(0, (WARPGROUPS, on_warpgroups, cases(WARPGROUP_SIZES, window), calls))
    wrong, checked = [], 0
    for where, kernels_there, attentions, calls in rounds:
        for attention in attentions:
            error = check(kernels_there, attention, device, calls)
            checked += 1
            if not error <= 1:
                wrong.append(f"{attention}{where}: {error:.3g} times the allowed error")
    print(f"{checked} configurations checked, {len(wrong)} wrong")
    return wrong


def seconds_or_none(action: Callable[[], object], what: str) -> dict[str, float]:
    """Return the median time under its name, or nothing where PyTorch cannot do it."""
    try:
        return {what: median_seconds([action])}
    except (RuntimeError, torch.OutOfMemoryError) as error:
        print(f"{what} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
        return {}


def flex_attention_seconds(attention: Attention, new: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the time of FlexAttention under the same mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(_b: object, _h: object, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & ((j < attention.sinks) | (i - j < attention.window))

    tokens = new["query"].shape[2]
    mask = create_block_mask(seen, None, None, tokens, tokens, device="cuda")
    compiled = torch.compile(flex_attention)
    action = partial(compiled, *(new[n] for n in ("query", "key", "value")), block_mask=mask, enable_gqa=True)
    return seconds_or_none(action, "flex")


def causal_seconds(attention: Attention, new: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the times of what PyTorch has, where the operator has an equal there."""
    seconds: dict[str, float] = {}
    if attention.bits is not None or not attention.head_size == attention.value_size == 128:
        return seconds
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            tensors = (new[n] for n in ("query", "key", "value"))
            causal = partial(scaled_dot_product_attention, *tensors, is_causal=True, enable_gqa=True)
            seconds |= seconds_or_none(causal, name)
    return seconds | flex_attention_seconds(attention, new)


def measure_prefill(kernels: AttentionKernels, attention: Attention, tokens: int) -> Iterator[Result]:
    """Measure one prompt, on Hopper also on warpgroups, and full causal attention over it."""
    device = torch.device("cuda")
    new = random_new(attention, 1, tokens, device)
    lengths = (
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.full((1,), tokens, device=device).int(),
    )
    special = special_noise(attention, 1, tokens, device)
    call = Call(attention, new, *lengths, attention.cache(1, device), special)
    others = causal_seconds(attention, new)
    ways = [("", kernels)]
    if kernels.takes_warpgroups(call):
        ways.append((WARPGROUPS, replace(kernels, on_warpgroups=True)))
    for where, kernels_there in ways:
        seconds = {"kernel": median_seconds([kernels_there.prepare(call).run])}
        name = f"prefill {tokens}, head {attention.head_size}{where}"
        yield Result(name, attention.form, attention.pairs(tokens), seconds | others)


def measure_decode(kernels: AttentionKernels, attention: Attention, batch: int) -> Result:
    """Measure a new token for each row over a full cache."""
    device = torch.device("cuda")
    new = random_new(attention, batch, 1, device)
    lengths = (torch.full((batch,), 50_000, device=device).int(), torch.ones(batch, device=device).int())
    cache = attention.cache(batch, device)
    for tensor in cache.values():
        tensor.random_(-100, 100) if tensor.dtype == torch.int8 else tensor.normal_()
    call = Call(attention, new, *lengths, cache, special_noise(attention, batch, 1, device))
    seconds = {"kernel": median_seconds([kernels.prepare(call).run])}
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds["copy"] = median_seconds([partial(target.copy_, source)])
    if attention.bits is None and batch == 1:
        keys, values = (cache[f"window_{kind}"] for kind in ("key", "value"))
        action = partial(scaled_dot_product_attention, new["query"], keys, values, enable_gqa=True)
        seconds |= seconds_or_none(action, "sdpa")
    name = f"decode {batch}, head {attention.head_size}"
    return Result(name, attention.form, attention.cache_bytes_read(batch), seconds)


def measure(kernels: AttentionKernels) -> Iterator[Result]:
    """Measure the issue's cases first, then every size and format."""
    usual = Attention()
    prompts = Attention(window=4096)
    for tokens in (SHORT, LONG):
        yield from measure_prefill(kernels, prompts, tokens)
    for batch, kept in itertools.product((MANY_ROWS, 1), WHOLE_WINDOWS):
        yield measure_decode(kernels, replace(usual, **kept), batch)
    for (head, value), kept in itertools.product(SIZES, FORMATS):
        case = replace(usual, head_size=head, value_size=value, **kept)
        if head != 128 or kept:
            yield from measure_prefill(kernels, replace(case, window=4096), SHORT)
        if head != 128 or case.recent:
            yield measure_decode(kernels, case, MANY_ROWS)
    for head, bits in itertools.product((64, 128), (8, 4, 2)):
        for special in ({"angles": head}, {"rotated": True}, {"angles": head, "rotated": True}):
            case = replace(usual, head_size=head, value_size=head, bits=bits, **special)
            yield from measure_prefill(kernels, replace(case, window=4096), SHORT)
            yield measure_decode(kernels, case, MANY_ROWS)


BENCHMARK = Benchmark(
    script=__file__,
    name="attention",
    check=lambda library: check_all(AttentionKernels.load(library)),
    measure=lambda library: measure(AttentionKernels.load(library)),
    table=table,
    shortfalls=shortfalls,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main(__doc__))
