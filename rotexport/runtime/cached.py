"""One stream of tokens through a saved graph and its cache: what sessions, proofs and evaluations run."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rotexport.errors import ValidationError

if TYPE_CHECKING:
    from rotexport.graph.weights import Array


class CachedGraph(ABC):
    """A graph with a cache that `length` tokens have filled.

    `path` is the file; `call_tokens` the most tokens that one call should read, `last_position` the last
    position that the graph can compute.
    """

    path: Path
    call_tokens: int
    last_position: int
    length: int = 0
    whole_prompt: bool = False  # the call that starts a stream chooses what stays: it must be all of a prompt

    @abstractmethod
    def run(self, tokens: Array, logits_of: Sequence[int], observed: Sequence[str] = ()) -> list[Array]:
        """Read tokens [S] in one call.

        Returns:
            Logits [len(logits_of), vocabulary] after those of the tokens, then the inner tensors [S, ·] that
            the graph was opened with.

        """

    @abstractmethod
    def reset(self) -> None:
        """Forget the stream."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes that the cache takes now."""

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """Return the cache by name, each tensor of a single row."""

    @abstractmethod
    def resume(self, state: dict[str, Array], length: int) -> None:
        """Take up a cache that `state` returned after `length` tokens."""

    def call(self, tokens: Sequence[int] | Array, logits_of: Sequence[int]) -> Array:
        """Read tokens [S] in one call; return logits [len(logits_of), vocabulary].

        Raises:
            ValidationError: the stream would outgrow the graph's positions.

        """
        self._check_room(len(tokens))
        return self.run(np.asarray(tokens, np.int64), logits_of)[0]

    def forward(self, tokens: Sequence[int] | Array) -> Iterator[tuple[Array, Array]]:
        """Read tokens; yield, call by call, those read and the logits [tokens, vocabulary] after each."""
        for piece in self.pieces(tokens):
            yield piece, self.call(piece, range(len(piece)))

    def logits(self, tokens: Array, calls: Sequence[int] | None = None) -> Array:
        """Return the logits [S, vocabulary] after each of tokens [S], from an empty cache.

        `calls` are how many tokens each call reads; by default as few calls as possible.
        """
        self.reset()
        if calls is None:
            return np.concatenate([logits for _, logits in self.forward(tokens)])
        bounds = np.cumsum([0, *calls])
        if bounds[-1] != len(tokens):
            raise ValueError(f"calls of {list(calls)} do not add up to {len(tokens)} tokens")
        parts = [self.call(tokens[a:b], range(b - a)) for a, b in itertools.pairwise(bounds)]
        return np.concatenate(parts)

    def observe(self, tokens: Array, names: Sequence[str]) -> dict[str, Array]:
        """Return inner tensors [S, ·], which the graph was opened with, of one call on an empty cache."""
        self.reset()
        found = self.run(np.asarray(tokens, np.int64), [0], names)
        return dict(zip(names, found[1:], strict=True))

    def pieces(self, tokens: Sequence[int] | Array) -> Iterator[Array]:
        """Cut tokens into calls."""
        ids = np.asarray(tokens, np.int64)
        self._check_room(len(ids))
        for start in range(0, len(ids), self.call_tokens):
            yield ids[start : start + self.call_tokens]

    def _check_room(self, count: int) -> None:
        if self.length + count > self.last_position + 1:
            raise ValidationError(
                f"{self.length} + {count} tokens pass {self.last_position}, the last position of "
                f"'{self.path}'; reset the stream{self.longer}"
            )

    longer: str = ""  # what else helps when positions run out
