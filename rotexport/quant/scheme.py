"""What a recipe asks of one site: typed, and checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from rotexport.errors import RecipeError

Group: TypeAlias = int | Literal["auto"] | None

LINEAR_FORMATS: Final = ("none", "int8", "int4", "fp8")
CACHE_FORMATS: Final = ("none", "int8", "int4", "int2", "fp8")
STREAMED_FORMATS: Final = ("int2", "fp8")  # of a cache that is bounded, not of one that grows
METHODS: Final = ("rtn", "search", "gptq")
GPTQ_ORDERS: Final = ("natural", "activation")
MODES: Final = ("static", "dynamic")
OBSERVERS: Final = ("max", "percentile", "mse")
AUTO_GROUPS: Final = (64, 32, 16)
DEFAULT_PERCENTILE: Final = 99.99


@dataclass(frozen=True)
class WeightScheme:
    """How the matrix of a site is stored.

    `group` counts input channels that share a scale; None is one scale per output channel. Without
    `symmetric` scales come with zero points; TensorRT runs them for int4 in groups behind quantized
    activations, where they are taken from the integers, and ONNX Runtime everywhere. `method` is
    "rtn" (scale from the largest magnitude), "search" (scale of least squared error) or "gptq" (least error
    of the layer's output on calibration text; outside blocks, as the head is, "search").
    """

    format: str = "none"
    group: Group = None
    symmetric: bool = True
    method: str = "search"

    def __post_init__(self) -> None:
        _one_of("weights.format", self.format, LINEAR_FORMATS)
        _one_of("weights.method", self.method, METHODS)
        _check_group("weights.group", self.group)
        if not isinstance(self.symmetric, bool):
            raise RecipeError(f"weights.symmetric: {self.symmetric!r} is not true or false")
        if not self.symmetric and self.format == "fp8":
            raise RecipeError("weights.symmetric: false needs integer codes, not fp8; set it to true")

    @property
    def enabled(self) -> bool:
        """Whether anything is quantized."""
        return self.format != "none"


@dataclass(frozen=True)
class GptqSettings:
    """How GPTQ runs.

    `damping` times the mean of H's diagonal is added to it. `order` "activation" quantizes input channels by
    falling second moment. `sweeps` counts rounds of descent with refitted scales afterwards.
    `feedback` aims at the float network's outputs from the quantized network's inputs, instead of at the
    float weight; `ridge` times that mean keeps the aim near the weight where text does not tell it better.
    With feedback, what joins the residual stream aims at the float network's stream; `residual` false leaves
    the error that is there already to itself.
    `relative` divides squared errors of what joins the residual stream by the stream's magnitude at their
    token, since the next norm will; otherwise a few massive tokens are most of H.
    Updates reach beyond `block` rows once per block, which changes speed only. `windows` of the calibration
    windows, evenly spread, are looked at; None is all.
    """

    damping: float = 0.01
    order: str = "natural"
    sweeps: int = 2
    feedback: bool = True
    block: int = 32
    windows: int | None = None
    ridge: float = 1.0
    relative: bool = True
    residual: bool = True

    def __post_init__(self) -> None:
        _check_fraction("gptq.damping", self.damping)
        if not _is_number(self.ridge) or self.ridge < 0:
            raise RecipeError(f"gptq.ridge: {self.ridge!r} is not a number of at least 0")
        _one_of("gptq.order", self.order, GPTQ_ORDERS)
        if not isinstance(self.sweeps, int) or self.sweeps < 0:
            raise RecipeError(f"gptq.sweeps: {self.sweeps!r} is not a number of rounds")
        for key in ("feedback", "relative", "residual"):
            if not isinstance(getattr(self, key), bool):
                raise RecipeError(f"gptq.{key}: {getattr(self, key)!r} is not true or false")
        if not isinstance(self.block, int) or self.block < 1:
            raise RecipeError(f"gptq.block: {self.block!r} is not a positive number of rows")
        if self.windows is not None and (not isinstance(self.windows, int) or self.windows < 1):
            raise RecipeError(f"gptq.windows: {self.windows!r} is not a positive number of windows")

    @property
    def takes_back(self) -> bool:
        """Whether products that join the stream aim at the float network's stream."""
        return self.feedback and self.residual


@dataclass(frozen=True)
class MixedScheme:
    """Which weights stay wider: those whose rounding hurts their block most per byte.

    `format` is what they get, per output channel ("none": no site stays wider), and `budget` the size of all
    quantized weights, relative to what they would take without.
    """

    format: str = "none"
    budget: float = 1.05

    def __post_init__(self) -> None:
        _one_of("mixed.format", self.format, ("none", "int8"))
        if not _is_number(self.budget) or not 1 <= self.budget <= 2:
            raise RecipeError(f"mixed.budget: {self.budget!r} is not between 1 and 2 times the size")

    @property
    def enabled(self) -> bool:
        """Whether any site may stay wider."""
        return self.format != "none" and self.budget > 1


@dataclass(frozen=True)
class HeadCorrection:
    """How the head takes up what error the blocks leave: from `windows` calibration windows (0: it does not).

    `ridge` times the mean second moment of the head's inputs keeps the correction near nothing where text
    does not tell.
    """

    windows: int = 0
    ridge: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.windows, bool) or not isinstance(self.windows, int) or self.windows < 0:
            raise RecipeError(f"correct_head.windows: {self.windows!r} is not a number of windows")
        if not _is_number(self.ridge) or self.ridge <= 0:
            raise RecipeError(f"correct_head.ridge: {self.ridge!r} is not a number above 0")

    @property
    def enabled(self) -> bool:
        """Whether the head changes."""
        return self.windows > 0


@dataclass(frozen=True)
class ClipSearch:
    """Which clips of activations are tried for every input, before weights are chosen and again behind them.

    `candidates` ratios lie between 1 and `lowest` (0: the recipe's clips stay), judged on the first `windows`
    of the calibration text.
    """

    candidates: int = 0
    lowest: float = 0.7
    windows: int = 4

    def __post_init__(self) -> None:
        for key, least in (("candidates", 0), ("windows", 1)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RecipeError(f"clip_search.{key}: {value!r} is not an integer of at least {least}")
        _check_fraction("clip_search.lowest", self.lowest)

    @property
    def enabled(self) -> bool:
        """Whether any clip is tried."""
        return self.candidates > 0


@dataclass(frozen=True)
class ActivationScheme:
    """How the input of a site is quantized.

    Static scales are per tensor, from calibration, where `observer` (and `percentile`, in percent of all
    elements) sets the range; dynamic scales are per token, or per token and `group` of channels, from
    the values themselves. Without `symmetric` the 16 levels of 4-bit activations reach from the least to the
    largest value, zero included. `clip` multiplies every range.
    """

    format: str = "none"
    mode: str = "static"
    observer: str = "max"
    percentile: float = DEFAULT_PERCENTILE
    clip: float = 1.0
    group: Group = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        _one_of("activations.format", self.format, LINEAR_FORMATS)
        _one_of("activations.mode", self.mode, MODES)
        _one_of("activations.observer", self.observer, OBSERVERS)
        _check_group("activations.group", self.group)
        _check_fraction("activations.clip", self.clip)
        if not _is_number(self.percentile) or not 50 < self.percentile <= 100:
            raise RecipeError(f"activations.percentile: {self.percentile!r} is not above 50 and at most 100")
        if self.mode == "static" and self.group is not None:
            raise RecipeError(
                f"activations.group: {self.group} needs activations.mode: dynamic; "
                "static scales are per tensor, so set the group to null"
            )
        if not isinstance(self.symmetric, bool):
            raise RecipeError(f"activations.symmetric: {self.symmetric!r} is not true or false")
        if not self.symmetric and (self.format, self.mode) != ("int4", "dynamic"):
            raise RecipeError(
                f"activations.symmetric: false is for dynamic int4, not {self.mode} {self.format}: "
                "codes less a zero point must fit 8 bits; set it to true"
            )

    @property
    def enabled(self) -> bool:
        """Whether anything is quantized."""
        return self.format != "none"


@dataclass(frozen=True)
class CacheScheme:
    """How keys and values are stored between calls: asymmetric, per token, head and `group` of channels.

    `group` None is the whole head; `clip` shrinks the range of every group about its middle. A streaming
    cache may keep its `recent` newest tokens in floating point and `center` keys about their calibrated mean.
    """

    key: str = "none"
    value: str = "none"
    group: Group = None
    clip: float = 1.0
    recent: int = 0
    center: bool = False

    def __post_init__(self) -> None:
        _one_of("kv_cache.key", self.key, CACHE_FORMATS)
        _one_of("kv_cache.value", self.value, CACHE_FORMATS)
        _check_group("kv_cache.group", self.group)
        _check_fraction("kv_cache.clip", self.clip)
        if isinstance(self.recent, bool) or not isinstance(self.recent, int) or self.recent < 0:
            raise RecipeError(f"kv_cache.recent: {self.recent!r} is not a number of tokens")
        if not isinstance(self.center, bool):
            raise RecipeError(f"kv_cache.center: {self.center!r} is not true or false")

    @property
    def enabled(self) -> bool:
        """Whether anything is quantized."""
        return (self.key, self.value) != ("none", "none")

    @property
    def bounded_only(self) -> str | None:
        """The first setting that a cache which grows does not have, as `key: value`."""
        settings = {
            f"key: {self.key}": self.key in STREAMED_FORMATS,
            f"value: {self.value}": self.value in STREAMED_FORMATS,
            f"recent: {self.recent}": self.recent > 0,
            "center: true": self.center,
        }
        return next((setting for setting, asked in settings.items() if asked), None)


def group_size(group: Group, length: int, key: str, where: str, least_groups: int = 1) -> int:
    """Return how many of `length` channels share a scale.

    "auto" is the largest of 64, 32 and 16 that leaves `least_groups` or more, else all. `key` and `where` go
    into the error.

    Raises:
        RecipeError: the group does not divide; the message names the nearest ones that do.

    """
    if group is None:
        return length
    if group == "auto":
        fitting = (size for size in AUTO_GROUPS if length % size == 0 and length >= least_groups * size)
        return next(fitting, length)
    if length % group == 0:
        return group
    divisors = [size for size in range(1, length + 1) if length % size == 0]
    nearest = [s for s in divisors if s < group][-1:] + [s for s in divisors if s > group][:1]
    raise RecipeError(
        f"{key}: {group} does not divide the {length} channels of {where}; "
        f"use {' or '.join(map(str, nearest))}, or 'auto'"
    )


def _one_of(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"{key}: {value!r} is not one of {', '.join(choices)}")


def _check_group(key: str, group: Any) -> None:
    if group in (None, "auto") or (isinstance(group, int) and not isinstance(group, bool) and group > 0):
        return
    raise RecipeError(f"{key}: {group!r} is not a positive number of channels, 'auto' or null")


def _check_fraction(key: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value <= 1:
        raise RecipeError(f"{key}: {value!r} is not above 0 and at most 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
