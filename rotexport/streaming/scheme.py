"""What a recipe asks of streaming attention, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from rotexport.errors import RecipeError
from rotexport.quant.scheme import CacheScheme
from rotexport.streaming.cache import CacheFormat
from rotexport.streaming.eviction import RING, Eviction

KINDS: Final = ("dense", "streaming")
MOST_SINKS: Final = 64
ALIBI: Final = "alibi"


@dataclass(frozen=True)
class AttentionScheme:
    """The recipe section `attention`.

    `dense` keeps the growing cache. `streaming` gives layers that see everything `sinks` first tokens and
    a `window` of newest ones (the query's own included), and lowers a window logit by `decay` per token of
    distance; layers that are windowed in the model keep their own window, without sinks. `decay` is one
    number, one for each query head, or `alibi` (slopes that halve from head to head, arXiv 2108.12409).
    With an `eviction` policy the window's slots hold what drew attention instead of the newest tokens.
    """

    kind: str = "dense"
    sinks: int = 4
    window: int = 1020
    decay: float | str | tuple[float, ...] = 0.0
    eviction: Eviction = RING

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
        object.__setattr__(self, "eviction", Eviction.read(self.eviction))
        self.eviction.check(self.window)
        if isinstance(self.decay, list):
            object.__setattr__(self, "decay", tuple(self.decay))
        given = self.decay if isinstance(self.decay, tuple) else (self.decay,)
        wrong = [slope for slope in given if not _is_slope(slope)]
        if wrong and self.decay != ALIBI:
            raise RecipeError(
                f"attention.decay: {wrong[0]!r} is not a finite number of at least 0, nor '{ALIBI}'"
            )

    def slopes(self, heads: int) -> list[float]:
        """Return the decay of each query head.

        Raises:
            RecipeError: the recipe gives another number of decays.

        """
        if isinstance(self.decay, str):
            return alibi_slopes(heads)
        if isinstance(self.decay, tuple):
            if len(self.decay) != heads:
                raise RecipeError(
                    f"attention.decay: {len(self.decay)} numbers do not fit {heads} query heads; "
                    "give one for each, or one for all"
                )
            return list(self.decay)
        return [float(self.decay)] * heads

    def for_context(self, stated: int | None) -> AttentionScheme:
        """Return the scheme for a model whose configuration states a context, which a recipe's own overrules.

        Raises:
            RecipeError: an eviction policy needs a context and neither states one, or it is below the window.

        """
        if not self.streaming or not self.eviction.enabled:
            return self
        context = stated if self.eviction.context is None else self.eviction.context
        scheme = replace(self, eviction=replace(self.eviction, context=context))
        scheme.eviction.require_context()
        return scheme

    def cache_format(self, cache: CacheScheme) -> CacheFormat:
        """Return how the window stores what the recipe section `kv_cache` asks.

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
        if cache.recent > self.window:
            raise RecipeError(
                f"kv_cache.recent: {cache.recent} tokens do not fit the window of {self.window}"
            )
        found = CacheFormat.named(cache.key, cache.group, cache.recent, cache.center)
        self.check_format(found)
        return found

    def check_format(self, found: CacheFormat) -> None:
        """Raise RecipeError when the eviction policy cannot keep tokens so."""
        if self.eviction.enabled and found.bits is not None:
            raise RecipeError(
                f"attention.eviction: {self.eviction.policy} keeps tokens in floating point, not in "
                f"{found.name}; set kv_cache.key and kv_cache.value to none, or eviction to none"
            )

    @property
    def streaming(self) -> bool:
        """Whether attention is to be swapped."""
        return self.kind == "streaming"

    @property
    def reach(self) -> int:
        """Tokens of a stream up to which streaming attention sees all that dense attention sees."""
        return self.sinks + self.window


def alibi_slopes(heads: int) -> list[float]:
    """Return ALiBi's slope of each head: 2^(-8 h / n), h = 1 ... n, where n is a power of two.

    Other numbers of heads take those of the power below, then every second one of the power above.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-4 * h / power) for h in range(1, 2 * power + 1, 2)]
    return slopes + between[: heads - power]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_slope(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
