"""Proof that a graph still computes what PyTorch computed.

Two questions are asked. While passes run: did this pass keep what it promises? Each graph runs in ONNX
Runtime before and after, so an error belongs to one pass. At the end: how far is the final graph from the
PyTorch model, at the logits, in perplexity, and block by block?

Tokens run in two calls, the second on the cache that the first left, so what a pass did to the cache is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import nn

from rotexport.errors import ValidationError
from rotexport.evaluate import Evaluation, evaluate
from rotexport.export.blocks import decoder_layers
from rotexport.graph.io import Scratch, save_model
from rotexport.graph.weights import Array
from rotexport.metrics import (
    Comparison,
    ThresholdResult,
    Thresholds,
    compare_logits,
    max_abs_error,
    token_sqnr_db,
)
from rotexport.passes.base import Pass, Preserves
from rotexport.runtime.cached import CachedGraph
from rotexport.runtime.model import tensors_among
from rotexport.runtime.opening import open_graph
from rotexport.transforms.transform import Transform

# Largest logit error over largest logit. Rounding in fp32 (2^-24 per operation) accumulates to some 1e-6 in a
# decoder, ten times that where a rotation mixes massive activations into small ones; a wrong sign, scale or
# transpose gives 1e-2 and more. fp16 and bf16 round 2^13 and 2^16 times coarser: there the bound can only
# catch what is broken.
TOLERANCES = {
    Preserves.ROUNDING: 1e-4,
    Preserves.PRECISION: 1e-1,
    Preserves.QUANTIZATION: np.inf,
    Preserves.CHANGED: np.inf,
}

BLOCK_BYTES = 64 << 20  # of block outputs held for comparison, however deep the model
DIVERGED_DB = 10.0  # a block whose error holds a tenth of its signal's power no longer follows the reference
PASS_TOKENS = 128  # a pass that breaks its promise shows on any text; the rest of the tokens is for the end
SECOND_CALL = 8  # tokens that run on the cache of those before them

Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class PassValidation:
    """What one pass did to the logits; `comparison` is None where the pass changed nothing."""

    name: str
    preserves: Preserves
    comparison: Comparison | None


class PassValidator:
    """Follows a graph through its passes; the graph after one pass is the graph before the next.

    Args:
        scratch: where graphs are saved to be run. A pass costs the bytes it changed.
        tokens: real token ids [S], of which the first `PASS_TOKENS` are used.
        tolerances: the largest relative logit error by what a pass promises.

    """

    def __init__(
        self, scratch: Scratch, tokens: Array, tolerances: dict[Preserves, float] | None = None
    ) -> None:
        self.records: list[PassValidation] = []
        self._scratch = scratch
        self._tokens = tokens[:PASS_TOKENS]
        self._tolerances = tolerances or TOLERANCES
        self._before: Array | None = None

    def start(self, graph: gs.Graph) -> None:
        """Run the graph that the first pass will get."""
        self._before = self._logits(graph, "the exported graph")

    def check(self, rewrite: Pass, changed: int, graph: gs.Graph) -> PassValidation:
        """Compare the graph after `rewrite`, which made `changed` rewrites, with the graph before it.

        Raises:
            ValidationError: the logits moved further than what the pass preserves allows.

        """
        if changed == 0:
            record = PassValidation(rewrite.name, rewrite.preserves, None)
        else:
            record = self._compare(rewrite, graph)
        self.records.append(record)
        return record

    def _compare(self, rewrite: Pass, graph: gs.Graph) -> PassValidation:
        if self._before is None:
            raise RuntimeError("PassValidator.start was not called with the graph before the first pass")
        after = self._logits(graph, f"the graph after pass '{rewrite.name}'")
        comparison = compare_logits(self._before, after)
        allowed = self._tolerances[rewrite.preserves]
        if comparison.relative_error > allowed:
            raise ValidationError(
                f"pass '{rewrite.name}' must leave the model {rewrite.preserves.value}, but it moved a logit "
                f"by {comparison.max_abs_error:.3g}, {comparison.relative_error:.2%} of the largest "
                f"({comparison.logit_scale:.3g}), where {allowed:.2%} is allowed "
                f"(SQNR {comparison.sqnr_db:.1f} dB over {comparison.tokens} tokens); "
                "please report this with the model's config, or build without this pass's part of the recipe"
            )
        self._before = after
        return PassValidation(rewrite.name, rewrite.preserves, comparison)

    def _logits(self, graph: gs.Graph, what: str) -> Array:
        path = self._scratch.directory / "validated.onnx"
        save_model(graph, path, self._scratch)
        logits = open_graph(path).logits(self._tokens, _pieces(self._tokens))
        _check_finite(logits, what)
        self._scratch.retire(graph)
        return logits


@dataclass(frozen=True)
class Reference:
    """What the PyTorch model computes of `tokens` [S]: logits [S, vocab], and each block's first outputs.

    `blocks` hold [T, width] each, T at most S and so few that all together stay within `BLOCK_BYTES`.

    `windows` [W, L] with their `evaluation` are absent when there was no text long enough.
    """

    tokens: Array
    logits: Array
    blocks: tuple[Array, ...]
    windows: Array | None = None
    evaluation: Evaluation | None = None


def _unchanged(stream: Array) -> Array:
    return stream


def _center(stream: Array) -> Array:
    centered: Array = stream - stream.mean(axis=-1, keepdims=True)
    return centered


@dataclass(frozen=True)
class StreamView:
    """How the graph's residual stream relates to PyTorch's.

    `of_graph` undoes the rotation folded into the stream (the inverse transform's `apply`); `of_reference`
    does to PyTorch's stream what the graph cannot undo (subtracting the mean, once LayerNorms are centered).
    """

    of_graph: Callable[[Array], Array] = field(default=_unchanged)
    of_reference: Callable[[Array], Array] = field(default=_unchanged)

    @classmethod
    def after(cls, rotation: Transform | None, centered: bool) -> StreamView:
        """Return the view of a stream that was rotated, and whose LayerNorms were centered."""
        return cls(
            of_graph=rotation.inverse().apply if rotation is not None else _unchanged,
            of_reference=_center if centered else _unchanged,
        )


@dataclass(frozen=True)
class BlockError:
    """The output of one decoder block against PyTorch: the median and the worst token's SQNR, in decibels."""

    block: int
    sqnr_db: float
    worst_token_db: float
    max_abs_error: float


@dataclass(frozen=True)
class Proof:
    """The final graph against PyTorch.

    `comparison` is over one call; `cached` over the same tokens in two calls that share a cache.
    """

    comparison: Comparison
    cached: Comparison | None
    reference_evaluation: Evaluation | None
    evaluation: Evaluation | None
    blocks: tuple[BlockError, ...]
    thresholds: tuple[ThresholdResult, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every threshold was met."""
        return all(result.passed for result in self.thresholds)

    @property
    def perplexity_ratio(self) -> float | None:
        """Perplexity of the graph over that of PyTorch."""
        if self.evaluation is None or self.reference_evaluation is None:
            return None
        return self.evaluation.perplexity / self.reference_evaluation.perplexity

    @property
    def first_diverged_block(self) -> int | None:
        """The first block whose median token has lost the reference (`DIVERGED_DB`)."""
        return next((error.block for error in self.blocks if error.sqnr_db < DIVERGED_DB), None)

    def figures(self) -> dict[str, float]:
        """Return what thresholds are checked against: the worse of the two comparisons, figure by figure."""
        runs = [run for run in (self.comparison, self.cached) if run is not None]
        figures = {
            "max_abs_error": max(run.max_abs_error for run in runs),
            "relative_error": max(run.relative_error for run in runs),
            "kl": max(run.kl for run in runs),
            "top1_agreement": min(run.top1_agreement for run in runs),
            "sqnr_db": min(run.sqnr_db for run in runs),
            "cosine": min(run.cosine for run in runs),
        }
        if self.perplexity_ratio is not None:
            figures["perplexity_ratio"] = self.perplexity_ratio
        if self.blocks:
            figures["block_sqnr_db"] = min(error.sqnr_db for error in self.blocks)
        return figures

    def require(self) -> None:
        """Raise ValidationError naming the thresholds that were missed and the first block that diverged."""
        missed = [str(result) for result in self.thresholds if not result.passed]
        if missed:
            block = self.first_diverged_block
            where = "" if block is None else f"; the first block that no longer follows PyTorch is {block}"
            raise ValidationError(f"{'; '.join(missed)}{where}")


def observe_reference(
    model: nn.Module, tokens: Array, windows: Array | None = None, advance: Advance = lambda done, of: None
) -> Reference:
    """Run the PyTorch model once over `tokens` [S] and, for its perplexity, over `windows` [W, L]."""
    outputs: list[Array] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        count = max(1, BLOCK_BYTES // (4 * len(layers) * hidden.shape[-1]))
        outputs.append(hidden[0, :count].float().numpy().copy())

    _, layers = decoder_layers(model)
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens[None].astype(np.int64)), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    array: Array = logits[0].float().numpy()
    _check_finite(array, "the PyTorch model")
    evaluation = None if windows is None else evaluate(model, windows, advance)
    return Reference(tokens, array, tuple(outputs), windows, evaluation)


def prove(
    reference: Reference,
    path: Path,
    thresholds: Thresholds,
    view: StreamView | None = None,
    advance: Advance = lambda done, of: None,
) -> Proof:
    """Compare the saved graph at `path` with what PyTorch computed.

    Blocks are compared where the graph still has the tensor `block.N.output`.

    Raises:
        ValidationError: the graph gives logits that are not finite. Missed thresholds raise in `require`.

    """
    names = [f"block.{index}.output" for index in range(len(reference.blocks))]
    kept = tensors_among(path, names)
    model = open_graph(path, extra_outputs=kept)
    logits = model.logits(reference.tokens)
    _check_finite(logits, f"'{path}'")
    streams = model.observe(reference.tokens[: len(reference.blocks[0])], kept) if kept else {}
    proof = Proof(
        comparison=compare_logits(reference.logits, logits),
        cached=_compare_cached(model, reference),
        reference_evaluation=reference.evaluation,
        evaluation=None if reference.windows is None else evaluate(model, reference.windows, advance),
        blocks=_block_errors(reference.blocks, streams, view or StreamView()),
    )
    results = tuple(thresholds.check(proof.figures()))
    return replace(proof, thresholds=results)


def _compare_cached(model: CachedGraph, reference: Reference) -> Comparison | None:
    pieces = _pieces(reference.tokens)
    if len(pieces) < 2:
        return None
    logits = model.logits(reference.tokens, pieces)
    _check_finite(logits, f"'{model.path}' on a filled cache")
    return compare_logits(reference.logits, logits)


def _block_errors(
    expected: Sequence[Array], streams: dict[str, Array], view: StreamView
) -> tuple[BlockError, ...]:
    errors = []
    for block, stream in enumerate(expected):
        found = streams.get(f"block.{block}.output")
        if found is None:
            continue
        wanted = view.of_reference(stream.astype(np.float64))
        actual = view.of_graph(found.astype(np.float64))
        ratios = token_sqnr_db(wanted, actual)
        errors.append(
            BlockError(block, float(np.median(ratios)), float(ratios.min()), max_abs_error(wanted, actual))
        )
    return tuple(errors)


def _pieces(tokens: Array) -> list[int]:
    """Split a sequence into its beginning and a few tokens that run on the cache of the beginning."""
    second = min(SECOND_CALL, len(tokens) // 2)
    return [len(tokens) - second, second] if second else [len(tokens)]


def _check_finite(logits: Array, what: str) -> None:
    finite = np.isfinite(logits).all(axis=-1)
    if not finite.all():
        token = int(np.argmin(finite.reshape(-1)))
        raise ValidationError(
            f"{what} gives logits that are not finite, first at token {token}: a float type with too little "
            "range (choose dtype bf16 or fp32), or a broken weight"
        )
