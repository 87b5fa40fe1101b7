"""What each target runs natively, as data, and the refusal of what it does not: before any weight is read.

Every row was found by building for the compute capabilities named (TensorRT-RTX 1.7.1) or taken from the
vendor's support matrix (TensorRT). What only runs by falling back to wider kernels counts as missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rotexport.errors import TargetError
from rotexport.quant.scheme import ActivationScheme, CacheScheme, WeightScheme
from rotexport.recipe import Recipe, load_recipe, preset_names

TARGETS: Final = ("onnx", "tensorrt-rtx", "tensorrt")
MODULES: Final = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}  # what builds and runs engines

GPUS: Final = {
    "sm75": "Turing",
    "sm80": "Ampere (A100)",
    "sm86": "Ampere (RTX 30)",
    "sm87": "Ampere (Orin)",
    "sm89": "Ada",
    "sm90": "Hopper",
    "sm100": "Blackwell (B200)",
    "sm103": "Blackwell (B300)",
    "sm110": "Blackwell (Thor)",
    "sm120": "Blackwell (RTX 50)",
    "sm121": "Blackwell (Spark)",
}

_RTX: Final = frozenset({"sm75", "sm80", "sm86", "sm89", "sm120", "sm121"})
_AMPERE: Final = frozenset(GPUS) - {"sm75"}
_FP8: Final = _AMPERE - {"sm80", "sm86", "sm87"}
_NOWHERE: Final[frozenset[str]] = frozenset()

ENGINE_GPUS: Final[Mapping[str, frozenset[str]]] = {
    "onnx": _NOWHERE,
    "tensorrt-rtx": _RTX,
    "tensorrt": frozenset(GPUS),
}


@dataclass(frozen=True)
class Demand:
    """What a recipe asks of a target at some of its sites."""

    dtype: str
    weights: WeightScheme
    activations: ActivationScheme
    cache: CacheScheme

    @property
    def integer_groups(self) -> bool:
        """Whether weights reach their product as integers, from which zero points were taken before."""
        grouped = self.weights.group is not None or self.activations.group is not None
        return self.weights.format == "int4" and self.activations.enabled and grouped

    @property
    def formats(self) -> tuple[str, str]:
        """The formats of the two factors of a product."""
        return self.weights.format, self.activations.format


@dataclass(frozen=True)
class Rule:
    """A feature that runs on some GPUs only, and what happens on the others."""

    feature: str
    wanted: Callable[[Demand], bool]
    gpus: frozenset[str]
    elsewhere: str


def _int4_weight_only(demand: Demand) -> bool:
    return demand.formats == ("int4", "none")


ENGINE_RULES: Final = (
    Rule(
        "zero points",
        lambda d: d.weights.enabled and not d.weights.symmetric and not d.integer_groups,
        _NOWHERE,
        "its parser refuses them; set weights.symmetric to true, or use target onnx "
        "(int4 weights in groups behind quantized activations need none)",
    ),
    Rule("bf16", lambda d: d.dtype == "bf16", _AMPERE, "the hardware has no bf16; use --dtype fp16"),
    Rule("fp32", lambda d: d.dtype == "fp32", _AMPERE, "the builder has no fp32 products; use --dtype fp16"),
    Rule("int8", lambda d: "int8" in d.formats, _AMPERE, "its weights would silently run in fp16"),
    Rule("int4", lambda d: "int4" in d.formats, _AMPERE, "the builder has no int4"),
    Rule("fp8", lambda d: "fp8" in d.formats, _FP8, "the hardware has no fp8"),
    Rule(
        "int4 weights with one scale per channel behind float activations",
        lambda d: _int4_weight_only(d) and d.weights.group is None,
        _NOWHERE,
        "the whole matrix would be dequantized on every run; set weights.group to 16, 32, 64 or 128",
    ),
    Rule(
        "int8 weights in groups behind float activations",
        lambda d: d.formats == ("int8", "none") and d.weights.group is not None,
        _NOWHERE,
        "the whole matrix would be dequantized on every run; set weights.group to null",
    ),
    Rule(
        "fp8 weights behind float activations",
        lambda d: d.formats == ("fp8", "none") and d.weights.group is not None,
        _NOWHERE,
        "the whole matrix would be dequantized on every run; set weights.group to null",
    ),
)
RUNTIME_RULES: Final = (
    Rule(
        "bf16",
        lambda d: d.dtype == "bf16",
        _NOWHERE,
        "ONNX Runtime's CPU kernels have no bf16 attention; use --dtype fp32 or fp16",
    ),
)
RULES: Final[Mapping[str, tuple[Rule, ...]]] = {
    "onnx": RUNTIME_RULES,
    "tensorrt-rtx": ENGINE_RULES,
    "tensorrt": ENGINE_RULES,
}
_BITS: Final = {"none": 16, "int8": 8, "fp8": 8, "int4": 4, "int2": 2}


def check(target: str, gpus: Sequence[str], recipe: Recipe) -> tuple[str, ...]:
    """Return the GPUs by their usual names when the target runs all that the recipe asks.

    Args:
        target: one of `TARGETS`.
        gpus: compute capabilities such as "sm89"; empty for the target `onnx`.
        recipe: what is asked.

    Raises:
        TargetError: an unknown target or GPU, a GPU the target has no engines for, or a format that one of
            the GPUs does not run; names the reason and the nearest preset that would work.

    """
    if target not in TARGETS:
        raise TargetError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    names = _engine_gpus(target, gpus)
    refusal = next(_refusals(target, names, recipe), None)
    if refusal is None:
        return names
    nearest = _nearest_preset(target, names, recipe)
    remedy = f"the nearest preset that works is '{nearest}'" if nearest else "no preset works there"
    raise TargetError(f"recipe '{recipe.name}': {refusal}; {remedy}")


def gpu_name(text: str) -> str:
    """Return the usual name (`sm89`) of a compute capability.

    Raises:
        TargetError: it is not a known one.

    """
    found = re.fullmatch(r"sm[_-]?(\d+)", text.strip().lower())
    name = f"sm{found[1]}" if found else ""
    if name not in GPUS:
        known = ", ".join(f"{gpu} {family}" for gpu, family in GPUS.items())
        raise TargetError(f"GPU {text!r} is not a known compute capability; use one of {known}")
    return name


def _engine_gpus(target: str, gpus: Sequence[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(gpu_name(gpu) for gpu in gpus))
    runs = ENGINE_GPUS[target]
    if not runs and names:
        raise TargetError(f"target {target} builds no engines: leave out --gpu {','.join(names)}")
    if runs and not names:
        raise TargetError(f"target {target} needs --gpu, one or more of {', '.join(_ordered(runs))}")
    for name in names:
        if name not in runs:
            raise TargetError(
                f"target {target} has no engines for {name} ({GPUS[name]}): its builder knows only "
                f"{', '.join(_ordered(runs))}; use target tensorrt on such a machine, or onnx"
            )
    return names


def _refusals(target: str, gpus: Sequence[str], recipe: Recipe) -> Iterator[str]:
    where: Sequence[str] = gpus or ("",)
    for demand in _demands(recipe):
        for rule in RULES[target]:
            for gpu in where:
                if gpu not in rule.gpus and rule.wanted(demand):
                    place = f"target {target} on {gpu}, {GPUS[gpu]}," if gpu else f"target {target}"
                    yield f"{place} has no native {rule.feature}: {rule.elsewhere}"


def _demands(recipe: Recipe) -> list[Demand]:
    """List what the recipe asks, first for all sites, then for every override."""
    pairs = [(recipe.weights, recipe.activations)]
    pairs += [(o.weights or recipe.weights, o.activations or recipe.activations) for o in recipe.overrides]
    return [Demand(recipe.dtype, weights, activations, recipe.kv_cache) for weights, activations in pairs]


def _nearest_preset(target: str, gpus: Sequence[str], recipe: Recipe) -> str | None:
    """Return the preset with the most similar bit widths and rotations among those that run."""
    legal = [p for p in map(load_recipe, preset_names()) if next(_refusals(target, gpus, p), None) is None]
    return min(legal, key=lambda p: _distance(p, recipe)).name if legal else None


def _distance(preset: Recipe, recipe: Recipe) -> tuple[bool, int, bool]:
    streams = preset.attention.streaming != recipe.attention.streaming
    pairs = zip(_widths(preset), _widths(recipe), strict=True)
    wider = sum(abs(a - b) for a, b in pairs)
    return streams, wider, preset.rotations.enabled != recipe.rotations.enabled


def _widths(recipe: Recipe) -> list[int]:
    cache = recipe.kv_cache
    return [_BITS[f] for f in (recipe.weights.format, recipe.activations.format, cache.key, cache.value)]


def _ordered(gpus: frozenset[str]) -> list[str]:
    return [gpu for gpu in GPUS if gpu in gpus]
