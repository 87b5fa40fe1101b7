"""What a recipe asks of streaming attention, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from rotexport.errors import RecipeError
from rotexport.quant.scheme import CacheScheme
from rotexport.streaming.cache import CacheFormat

KINDS: Final = ("dense", "streaming")
EVICTIONS: Final = ("none",)
MOST_SINKS: Final = 64


@dataclass(frozen=True)
class AttentionScheme:
    """The recipe section `attention`.

    `dense` keeps the growing cache. `streaming` gives layers that see everything `sinks` first tokens and
    a `window` of newest ones (the query's own included), and lowers a window logit by `decay` per token of
    distance; layers that are windowed in the model keep their own window, without sinks.
    """

    kind: str = "dense"
    sinks: int = 4
    window: int = 1020
    decay: float = 0.0
    eviction: str = "none"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"attention.kind: {self.kind!r} is not one of {', '.join(KINDS)}")
        if not _is_int(self.window) or self.window < 1:
            raise RecipeError(
                f"attention.window: {self.window!r} is not a positive number of tokens; a query sees itself"
            )
        if not _is_int(self.sinks) or not 0 <= self.sinks <= min(MOST_SINKS, self.window):
            raise RecipeError(
                f"attention.sinks: {self.sinks!r} is not between 0 and {min(MOST_SINKS, self.window)} "
                f"(at most {MOST_SINKS}, and no more than the window of {self.window})"
            )
        if not _is_number(self.decay) or not 0 <= self.decay < float("inf"):
            raise RecipeError(f"attention.decay: {self.decay!r} is not a finite number of at least 0")
        if self.eviction not in EVICTIONS:
            raise RecipeError(f"attention.eviction: {self.eviction!r} is not one of {', '.join(EVICTIONS)}")

    @property
    def streaming(self) -> bool:
        """Whether attention is to be swapped."""
        return self.kind == "streaming"

    @property
    def reach(self) -> int:
        """Tokens of a stream up to which streaming attention sees all that dense attention sees."""
        return self.sinks + self.window


def stream_format(cache: CacheScheme, window: int) -> CacheFormat:
    """Return how a ring of `window` slots stores what the recipe section `kv_cache` asks.

    Raises:
        RecipeError: streaming attention cannot store this.

    """
    if cache.key != cache.value:
        raise RecipeError(
            f"kv_cache: streaming stores keys and values alike, not {cache.key} and {cache.value}; "
            "give both one format"
        )
    if cache.clip != 1.0:
        raise RecipeError(
            f"kv_cache.clip: streaming stores whole ranges, not {cache.clip} of them; set it to 1"
        )
    if cache.recent > window:
        raise RecipeError(f"kv_cache.recent: {cache.recent} tokens do not fit the window of {window}")
    return CacheFormat.named(cache.key, cache.group, cache.recent, cache.center)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
