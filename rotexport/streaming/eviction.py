"""Eviction by attention: which tokens stay in a bounded cache when it is not simply the newest ones.

    ring           the newest `window` tokens (policy `none`)
    heavy-hitter   those that drew most attention so far (H2O, arXiv 2306.14048), with optional forgetting
    snapkv         those that the end of the prompt attended to (SnapKV, arXiv 2404.14469)

Attention is weighed with the L2 norm of the value (VATP, arXiv 2406.12335), which no rotation changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from rotexport.errors import RecipeError

OPERATORS: Final = {"heavy-hitter": "HeavyHitterAttention", "snapkv": "SnapAttention"}
POLICIES: Final = ("none", *OPERATORS)


@dataclass(frozen=True)
class Eviction:
    """The recipe section `attention.eviction`.

    The `recent` newest tokens always stay, as sinks do; a token goes when it is `context` behind, the number
    of tokens the model was trained on (None until the model is known: what its configuration states).
    `forget` multiplies scores per token read (heavy-hitter); the last `observe` tokens of the prompt choose
    (snapkv).
    """

    policy: str = "none"
    recent: int = 128
    context: int | None = None
    forget: float = 1.0
    observe: int = 32

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise RecipeError(f"attention.eviction: {self.policy!r} is not one of {', '.join(POLICIES)}")
        for name in ("recent", "observe"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RecipeError(f"attention.eviction.{name}: {value!r} is not a positive number of tokens")
        if (
            isinstance(self.forget, bool)
            or not isinstance(self.forget, int | float)
            or not 0 <= self.forget <= 1
        ):
            raise RecipeError(f"attention.eviction.forget: {self.forget!r} is not between 0 and 1")
        if self.context is not None and (
            isinstance(self.context, bool) or not isinstance(self.context, int) or self.context < 1
        ):
            raise RecipeError(
                f"attention.eviction.context: {self.context!r} is not a positive number of tokens; give the "
                "length the model was trained on"
            )

    @classmethod
    def read(cls, value: Any) -> Eviction:
        """Take a policy's name, or the section as a mapping."""
        if isinstance(value, Eviction):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise RecipeError(f"attention.eviction: {value!r} is neither a policy nor a section of settings")
        known = [field.name for field in fields(cls)]
        for key in value:
            if key not in known:
                raise RecipeError(f"attention.eviction.{key}: unknown key; known are {', '.join(known)}")
        return cls(**value)

    @property
    def enabled(self) -> bool:
        """Whether scores choose what stays."""
        return self.policy != "none"

    @property
    def whole_prompts(self) -> bool:
        """Whether the call that starts a stream must read all of its prompt."""
        return self.policy == "snapkv"

    @property
    def memory(self) -> str:
        """What is kept beside a token: its running `score`, or what was `observed` at the prompt's end."""
        return "score" if self.policy == "heavy-hitter" else "observed"

    def check(self, window: int) -> None:
        """Raise RecipeError where the policy leaves nothing to choose in `window` slots."""
        if not self.enabled:
            return
        if self.recent >= window:
            raise RecipeError(
                f"attention.eviction.recent: {self.recent} newest tokens leave none of {window} slots to "
                "choose for; raise attention.window"
            )
        if self.context is not None and self.context < window:
            raise RecipeError(
                f"attention.eviction.context: {self.context} tokens are fewer than the window of {window}; "
                "lower attention.window"
            )

    def require_context(self) -> None:
        """Raise RecipeError where a policy does not know how far back the model was trained to look."""
        if self.enabled and self.context is None:
            raise RecipeError(
                "attention.eviction.context: the model's configuration states no max_position_embeddings; "
                "give the length the model was trained on"
            )

    @property
    def attributes(self) -> dict[str, int | float]:
        """The operator's attributes beside those of its sizes."""
        assert self.context is not None, "required before a cache is made"
        own: dict[str, int | float] = (
            {"forget": float(self.forget)} if self.policy == "heavy-hitter" else {"observe": self.observe}
        )
        return own | {"recent": self.recent, "context": self.context}


RING: Final = Eviction()
