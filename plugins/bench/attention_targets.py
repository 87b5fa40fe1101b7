"""What sink/window attention must reach on a GPU, and the table of what it reached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpu_attention import Attention

COPY_BYTES = 2**30
SHORT, LONG = 32768, 131072  # tokens of prompts
MANY_ROWS = 64
WARPGROUPS = ", warpgroups"  # how names of what ran on Hopper's instructions end
PREFILL_OF_FLASH = 0.85
WARPGROUPS_OF_CUDNN = 0.65
WARPGROUPS_TIMES_CAUSAL = {SHORT: 2.5, LONG: 9.0}
LONG_OF_SHORT = (4.2 / 1.1, 4.2 * 1.1)
DECODE_OF_COPY: dict[int | None, float] = {None: 0.80, 8: 0.70, 4: 0.60}
DECODE_TIMES_SDPA = 1.5
NEVER = float("nan")  # of what did not run: fails every comparison


@dataclass(frozen=True)
class Result:
    """Median seconds of one case, and of what it is compared with."""

    name: str
    form: str
    work: int  # visited pairs per query head of a prompt; bytes that decoding must read
    seconds: dict[str, float]

    def times(self, other: str) -> float:
        """Return how many times faster than `other` the kernel is."""
        return self.seconds.get(other, NEVER) / self.seconds["kernel"]


def of_causal_rate(result: Result, backend: str, tokens: int) -> float:
    """Return the kernel's visited pairs per second as a fraction of a causal backend's."""
    return result.work / (tokens * (tokens + 1) / 2) * result.times(backend)


def of_copy(result: Result) -> float:
    """Return the bandwidth of what must be read as a fraction of the copy's."""
    return result.work / result.seconds["kernel"] / (2 * COPY_BYTES / result.seconds["copy"])


def rate_shortfalls(short: Result, backend: str, least: float) -> Iterator[str]:
    """Yield what a prompt misses of a backend's rate."""
    rate = of_causal_rate(short, backend, SHORT)
    if not rate >= least:
        yield f"{short.name}: {rate:.2f} of the {backend} backend's rate, must be {least:.2f}"


def growth_shortfalls(short: Result, long: Result) -> Iterator[str]:
    """Yield what is wrong with how time grows along prompts."""
    growth = long.seconds["kernel"] / short.seconds["kernel"]
    if not LONG_OF_SHORT[0] <= growth <= LONG_OF_SHORT[1]:
        yield f"{long.name}: {growth:.2f} times as long as {SHORT} tokens, must be 4.2 within 10 %"


def warpgroup_shortfalls(prompts: dict[int, Result]) -> Iterator[str]:
    """Yield what prompts on Hopper's warpgroups miss, by their tokens."""
    short = prompts[SHORT]
    yield from rate_shortfalls(short, "cudnn", WARPGROUPS_OF_CUDNN)
    if not short.times("flex") > 1:
        yield f"{short.name}: {short.times('flex'):.2f} times as fast as FlexAttention, must be faster"
    for tokens, least in WARPGROUPS_TIMES_CAUSAL.items():
        result = prompts[tokens]
        times = min(
            (result.times(name) for name in ("flash", "cudnn") if name in result.seconds), default=NEVER
        )
        if not times >= least:
            yield f"{result.name}: {times:.2f} times as fast as full causal attention, must be {least:.1f}"
    yield from growth_shortfalls(short, prompts[LONG])


def decode_shortfalls(found: dict[tuple[str, str], Result]) -> Iterator[str]:
    """Yield what decoding misses."""
    for bits, least in DECODE_OF_COPY.items():
        result = found[f"decode {MANY_ROWS}, head 128", replace(Attention(), bits=bits).form]
        if not of_copy(result) >= least:
            yield f"{result.name}, {result.form}: {of_copy(result):.2f} of the copy, must be {least:.2f}"
    one = found["decode 1, head 128", "float"]
    times = one.seconds["kernel"] / one.seconds.get("sdpa", NEVER)
    if not times <= DECODE_TIMES_SDPA:
        yield f"{one.name}: {times:.2f} times as long as SDPA, must be {DECODE_TIMES_SDPA}"


def shortfalls(results: list[Result]) -> Iterator[str]:
    """Yield in words what results miss; of warpgroups only where they ran."""
    found = {(result.name, result.form): result for result in results}
    prompts = {tokens: found[f"prefill {tokens}, head 128", "float"] for tokens in (SHORT, LONG)}
    yield from rate_shortfalls(prompts[SHORT], "flash", PREFILL_OF_FLASH)
    yield from growth_shortfalls(prompts[SHORT], prompts[LONG])
    on_warpgroups = {
        tokens: found[key]
        for tokens in (SHORT, LONG)
        if (key := (f"prefill {tokens}, head 128{WARPGROUPS}", "float")) in found
    }
    if on_warpgroups:
        yield from warpgroup_shortfalls(on_warpgroups)
    yield from decode_shortfalls(found)


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
