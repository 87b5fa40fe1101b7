"""The shapes an engine accepts: every symbolic dimension of the cached graph, given by a few limits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import onnx

from rotexport.errors import TargetError

Shapes: TypeAlias = dict[str, tuple[list[int], list[int], list[int]]]
Range: TypeAlias = tuple[int, int, int]

LOGIT_POSITIONS: Final = 16  # of a row, whose logits a streaming engine computes in one call


@dataclass(frozen=True)
class Profiles:
    """How large a call may be: `max_batch` rows, `max_length` tokens in all (cached and new).

    `window` is that of a bounded cache, which takes any number of cached tokens and as many new ones.

    Raises:
        TargetError: a limit is not a positive number, or the length leaves no room for a cached token.

    """

    max_batch: int = 1
    max_length: int = 2048
    window: int | None = None

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise TargetError(f"max batch {self.max_batch} is not at least 1")
        if self.max_length < 2:
            raise TargetError(
                f"max length {self.max_length} is not at least 2 (one cached token and a new one)"
            )

    def streaming(self, window: int, whole_prompts: bool = False) -> Profiles:
        """Return the limits for a graph whose cache is bounded by `window`.

        Calls are no longer than the window, unless they must read whole prompts.
        """
        longest = self.max_length if whole_prompts else max(2, min(self.max_length, window))
        return replace(self, max_length=longest, window=window)

    def whole(self) -> dict[str, Range]:
        """Return (min, opt, max) of each dimension for one profile of all calls, best at single steps."""
        return self._ranges(new=(1, 1, self.max_length), past=(0, self.max_length // 2, self.max_length - 1))

    def split(self) -> list[dict[str, Range]]:
        """Return two profiles, prompts and single steps, for builders that choose kernels per profile."""
        usual = max(1, self.max_length // 2)
        prompts = self._ranges(new=(1, usual, self.max_length), past=(0, 0, self.max_length - 1))
        steps = self._ranges(new=(1, 1, 1), past=(0, usual, self.max_length - 1))
        return [prompts, steps]

    def _ranges(self, new: Range, past: Range) -> dict[str, Range]:
        total = (1, min(new[1] + past[1], self.max_length), self.max_length)
        ranges = {"batch": (1, 1, self.max_batch), "sequence": new}
        if self.window is None:
            return ranges | {"past": past, "total": total}
        return ranges | {"logit_count": (1, 1, min(LOGIT_POSITIONS, new[2]))}


def input_shapes(model: onnx.ModelProto, ranges: dict[str, Range]) -> Shapes:
    """Return the (min, opt, max) shape of every dynamic input, from the names of its dimensions.

    Raises:
        TargetError: an input has a dimension without a size whose name is not in `ranges`.

    """
    shapes: Shapes = {}
    for value in model.graph.input:
        dims = [(d.dim_param or None, d.dim_value) for d in value.type.tensor_type.shape.dim]
        unknown = [name for name, size in dims if (name or not size) and name not in ranges]
        if unknown:
            raise TargetError(
                f"input '{value.name}' has a dimension called {unknown[0]!r}; call it {' or '.join(ranges)}"
            )
        if any(name for name, _ in dims):
            smallest, usual, largest = (
                [ranges[name][i] if name else size for name, size in dims] for i in range(3)
            )
            shapes[value.name] = (smallest, usual, largest)
    return shapes
