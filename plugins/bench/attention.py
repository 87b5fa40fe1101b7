"""Checks and measures sink/window attention on the GPU of this machine (run.sh sets everything up).

Correctness: random ragged streams, call by call through the cache, poisoned outputs, float64 references, the
error bound of kernels/attention.h; what a call stores is checked by the calls that read it. Speed: medians
over CUDA events. Prefill is compared by visited (query, key) pairs per second with PyTorch's SDPA, its flash
and its cuDNN backend under a causal mask, and in time with them and with FlexAttention under the same mask;
decoding by the bytes that it must read with a device-to-device copy, and with SDPA over as many keys. All in
one run. Writes bench/results/GPU-DATE-attention.json. Exit status 1 when a result is wrong, 2 when one is
slower than it must be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from fast_hadamard import EPSILON, machine, median_seconds, sanitize
from gpu_attention import NEW, Attention, AttentionKernels, Call
from gpu_kernels import PLUGINS, build
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (112, 48)]
FORMATS: list[tuple[int | None, int]] = [(None, 0), (8, 0), (4, 0), (2, 0), (8, 32), (4, 32), (2, 32)]
CALLS = [(200, 30), (3, 16), (1, 0), (97, 180)]  # new tokens of two rows
COPY_BYTES = 2**30
SHORT, LONG = 32768, 131072  # tokens of prompts
MANY_ROWS = 64
PREFILL_OF_FLASH = 0.85
LONG_OF_SHORT = (4.2 / 1.1, 4.2 * 1.1)
DECODE_OF_COPY: dict[int | None, float] = {None: 0.80, 8: 0.70, 4: 0.60}
DECODE_TIMES_SDPA = 1.5


@dataclass(frozen=True)
class Result:
    """Median seconds of one case, and of what it is compared with."""

    name: str
    form: str
    work: int  # visited pairs per query head of a prompt; bytes that decoding must read
    seconds: dict[str, float]

    def times(self, other: str) -> float:
        """Return how many times faster than `other` the kernel is."""
        return self.seconds[other] / self.seconds["kernel"]


def random_new(
    attention: Attention, batch: int, tokens: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the tensors that a call brings."""
    a = attention
    heads = {"query": a.query_heads, "query_sink": a.query_heads, "key": a.kv_heads, "value": a.kv_heads}
    sizes = {"value": a.value_size}
    return {
        name: torch.randn(
            batch, heads[name], tokens, sizes.get(name, a.head_size), device=device, dtype=a.dtype
        )
        for name in NEW
    }


def check(kernels: AttentionKernels, attention: Attention, device: torch.device) -> float:
    """Return the largest error as a fraction of the allowed one; above 1, or NaN, is wrong."""
    lengths = [sum(row) for row in zip(*CALLS, strict=True)]
    streams = random_new(attention, len(lengths), max(lengths), device)
    rows = [{name: t[b, :, :length] for name, t in streams.items()} for b, length in enumerate(lengths)]
    expected = [attention.expected(row) for row in rows]
    allowed = (3 * EPSILON[attention.dtype] + 2.0**-18 * 33) * float(streams["value"].abs().max())
    past = torch.zeros(len(lengths), dtype=torch.int32)
    cache = attention.cache(len(lengths), device)
    worst = 0.0
    for counts in CALLS:
        new = {name: torch.full_like(t[:, :, : max(counts)], torch.nan) for name, t in streams.items()}
        for b, (p, n) in enumerate(zip(past.tolist(), counts, strict=True)):
            for name, tensor in new.items():
                tensor[b, :, :n] = rows[b][name][:, p : p + n]
        count = torch.tensor(counts, dtype=torch.int32)
        launch = kernels.prepare(Call(attention, new, past.to(device), count.to(device), cache))
        launch.run()
        for b, (p, n) in enumerate(zip(past.tolist(), counts, strict=True)):
            if n:
                error = (launch.output[b, :, :n].double() - expected[b][:, p : p + n]).abs().max()
                worst = max(worst, float(error) / allowed) if not error.isnan() else float("nan")
            if bool((launch.output[b, :, n:] != 0).any()):
                return float("inf")
        past += count
    return worst


def check_all(kernels: AttentionKernels) -> list[str]:
    """Return what is wrong."""
    wrong, checked = [], 0
    for sizes, (bits, recent), dtype in itertools.product(SIZES, FORMATS, (torch.float16, torch.bfloat16)):
        attention = Attention(*sizes, kv_heads=2, repeat=3, window=128, bits=bits, recent=recent, dtype=dtype)
        capped = replace(attention, softcap=5.0, decay=0.02, group=16 if bits else None)
        for one in (attention, capped):
            error = check(kernels, one, torch.device("cuda"))
            checked += 1
            if not error <= 1:
                wrong.append(f"{one}: {error:.3g} times the allowed error")
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


def measure_prefill(kernels: AttentionKernels, attention: Attention, tokens: int) -> Result:
    """Measure one prompt, and full causal attention over it where the operator has an equal in PyTorch."""
    device = torch.device("cuda")
    new = random_new(attention, 1, tokens, device)
    lengths = (
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.full((1,), tokens, device=device).int(),
    )
    launch = kernels.prepare(Call(attention, new, *lengths, attention.cache(1, device)))
    seconds = {"kernel": median_seconds([launch.run])}
    if attention.bits is None and attention.head_size == attention.value_size == 128:
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            with sdpa_kernel(backend):
                causal = partial(
                    scaled_dot_product_attention,
                    *(new[n] for n in ("query", "key", "value")),
                    is_causal=True,
                    enable_gqa=True,
                )
                seconds |= seconds_or_none(causal, name)
        seconds |= flex_attention_seconds(attention, new)
    return Result(
        f"prefill {tokens}, head {attention.head_size}", attention.form, attention.pairs(tokens), seconds
    )


def measure_decode(kernels: AttentionKernels, attention: Attention, batch: int) -> Result:
    """Measure a new token for each row over a full cache."""
    device = torch.device("cuda")
    new = random_new(attention, batch, 1, device)
    lengths = (torch.full((batch,), 50_000, device=device).int(), torch.ones(batch, device=device).int())
    cache = attention.cache(batch, device)
    for tensor in cache.values():
        tensor.random_(-100, 100) if tensor.dtype == torch.int8 else tensor.normal_()
    seconds = {"kernel": median_seconds([kernels.prepare(Call(attention, new, *lengths, cache)).run])}
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
        yield measure_prefill(kernels, prompts, tokens)
    for batch, bits in itertools.product((MANY_ROWS, 1), (None, 8, 4, 2)):
        yield measure_decode(kernels, replace(usual, bits=bits), batch)
    for (head, value), (bits, recent) in itertools.product(SIZES, FORMATS):
        case = replace(usual, head_size=head, value_size=value, bits=bits, recent=recent)
        if (head, bits, recent) != (128, None, 0):
            yield measure_prefill(kernels, replace(case, window=4096), SHORT)
        if head != 128 or recent:
            yield measure_decode(kernels, case, MANY_ROWS)


def of_causal_rate(result: Result, backend: str, tokens: int) -> float:
    """Return the kernel's visited pairs per second as a fraction of a causal backend's."""
    return result.work / (tokens * (tokens + 1) / 2) * result.times(backend)


def of_copy(result: Result) -> float:
    """Return the bandwidth of what must be read as a fraction of the copy's."""
    return result.work / result.seconds["kernel"] / (2 * COPY_BYTES / result.seconds["copy"])


def shortfalls(results: list[Result]) -> Iterator[str]:
    """Yield in words what results miss."""
    found = {(result.name, result.form): result for result in results}
    short = found[f"prefill {SHORT}, head 128", "float"]
    long = found[f"prefill {LONG}, head 128", "float"]
    rate = of_causal_rate(short, "flash", SHORT) if "flash" in short.seconds else float("nan")
    if not rate >= PREFILL_OF_FLASH:
        yield f"{short.name}: {rate:.2f} of the flash backend's rate, must be {PREFILL_OF_FLASH:.2f}"
    growth = long.seconds["kernel"] / short.seconds["kernel"]
    if not LONG_OF_SHORT[0] <= growth <= LONG_OF_SHORT[1]:
        yield f"{LONG} tokens take {growth:.2f} times as long as {SHORT}, must be 4.2 within 10 %"
    for bits, least in DECODE_OF_COPY.items():
        result = found[f"decode {MANY_ROWS}, head 128", replace(Attention(), bits=bits).form]
        if not of_copy(result) >= least:
            yield f"{result.name}, {result.form}: {of_copy(result):.2f} of the copy, must be {least:.2f}"
    one = found["decode 1, head 128", "float"]
    times = one.seconds["kernel"] / one.seconds.get("sdpa", float("nan"))
    if not times <= DECODE_TIMES_SDPA:
        yield f"{one.name}: {times:.2f} times as long as SDPA, must be {DECODE_TIMES_SDPA}"


def table(results: list[Result]) -> str:
    """Return the results as the Markdown table of plugins/README.md."""
    others = ("flash", "cudnn", "flex", "sdpa")
    lines = [f"| case | window | us | of the copy | {' | '.join(f'times {o}' for o in others)} |"]
    lines.append("|---" * (4 + len(others)) + "|")
    for result in results:
        copy = f"{of_copy(result):.2f}" if "copy" in result.seconds else ""
        times = " | ".join(f"{result.times(o):.2f}" if o in result.seconds else "" for o in others)
        microseconds = result.seconds["kernel"] * 1e6
        lines.append(f"| {result.name} | {result.form} | {microseconds:.1f} | {copy} | {times} |")
    return "\n".join(lines)


def write(results: list[Result]) -> Path:
    """Write the results and what they were measured on, and return the file."""
    about = machine()
    folder = PLUGINS / "bench" / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{about['gpu'].replace(' ', '-')}-{about['date']}-attention.json".lower()
    record = {"machine": about, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(record, indent=1), "utf-8")
    return path


def main() -> int:
    """Build, check, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, help="a built librotexport_bench.so; default: build it")
    parser.add_argument("--check-only", action="store_true", help="check, but do not measure")
    parser.add_argument("--sanitize", action="store_true", help="check under compute-sanitizer too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU on this machine: run this where one is")
    library = arguments.library or build(PLUGINS / "build" / "bench")
    kernels = AttentionKernels(library)
    wrong = check_all(kernels)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if arguments.sanitize:
        sanitize(__file__, library)
    if arguments.check_only:
        return 0
    results = []
    for result in measure(kernels):
        results.append(result)
        torch.cuda.empty_cache()
    missed = list(shortfalls(results))
    print(table(results))
    print("\n".join(missed) or "every case reaches what it must")
    print(f"written to {write(results)}")
    return 2 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
