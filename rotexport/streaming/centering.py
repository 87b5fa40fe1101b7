"""The mean key of every head, subtracted before keys are quantized.

A few channels of a key hold nearly the same large value for all tokens before rotary embedding; taken out,
what is left needs fewer levels. Rotary embedding turns the mean mu with the position, and is linear in
cos and sin: with the angles a_j = (cos f_1 j, ..., sin f_1 j, ...) of position j,

    mean key at j = RoPE_j(mu) = M a_j,        <q, RoPE_j(mu)> = <M' q, a_j>

where M [D, R] follows from mu, and from a rotation behind the embedding (R3) if there is one. So a query pays
R products per cached token for the mean, with angles that all heads and layers share, and no key is touched.
(SmolLM2-135M on WikiText-2, int2 in groups of 16, 128 recent tokens: 8.9, 10.4, 5.7, 2.1 and 2.7 % more
perplexity than the float cache over the first five thousands of tokens. With a mean that does not turn it
grew from thousand to thousand.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from rotexport.errors import RecipeError, UnsupportedModelError
from rotexport.graph.basis import attention_nodes, new_key
from rotexport.graph.edit import producer
from rotexport.graph.io import to_proto
from rotexport.graph.positions import Positions
from rotexport.graph.weights import Array, weight_of
from rotexport.quant.calibrate import Run

LINEAR_WITHIN = 1e-2  # of the largest mean: half precision rounds on the way


def mean_keys(graph: gs.Graph, run: Run, windows: Sequence[Array], sinks: int) -> dict[int, Array]:
    """Return the mean new key [Hk, D] of each attention before positions turn it, by layer number.

    Args:
        graph: the float graph, rotations done, attention not swapped yet.
        run: runs that graph on windows of token ids from an empty cache.
        windows: token ids [S] each.
        sinks: first tokens of each window that do not count: they are never quantized.

    Raises:
        RecipeError: no window is longer than the sinks.
        UnsupportedModelError: see `key_path`.

    """
    positions = Positions(graph)
    names = {
        number: key_path(positions, new_key(node)).source.name for number, node in attention_nodes(graph)
    }
    sums: dict[int, Array] = {}
    count = 0
    for values in run(windows, list(names.values())):
        for number, name in names.items():
            keys = values[name][0, :, sinks:].astype(np.float64)
            sums[number] = sums.get(number, 0.0) + keys.sum(axis=1)
        count += keys.shape[1]
    if count == 0:
        raise RecipeError(f"kv_cache.center: no calibration window is longer than the {sinks} sinks")
    return {number: (total / count).astype(np.float32) for number, total in sums.items()}


@dataclass(frozen=True)
class KeyPath:
    """How positions turn a key: `key` [B, Hk, S, D] is linear in `source`, and affine in all `angles`.

    `source` is [B, Hk, S, D]; `angles` are [B, S, F] each and follow from positions alone (cos and sin).
    """

    source: gs.Variable
    angles: tuple[gs.Variable, ...]
    key: gs.Variable

    def mean_map(self, mean: Array) -> tuple[Array, bool]:
        """Return M [Hk, D, R] of a mean [Hk, D] at the source, and whether its last column is constant.

        The mean key at a position is M times its angles, concatenated, behind which a 1 stands if part of
        the key does not turn.

        Raises:
            UnsupportedModelError: the key is not affine in the angles.

        """
        widths = [tensor.shape[-1] for tensor in self.angles]
        total = sum(widths)
        probes = np.concatenate(
            [np.eye(total), np.zeros((1, total)), np.random.default_rng(0).uniform(-1, 1, (1, total))]
        )
        keys = self._evaluate(mean, np.split(probes, np.cumsum(widths)[:-1], axis=1) if widths else [])
        still = keys[:, total]
        columns = keys[:, :total] - still[:, None]
        expected = np.einsum("hrd,r->hd", columns, probes[-1]) + still
        scale = np.abs(keys).max()
        if np.abs(keys[:, -1] - expected).max() > LINEAR_WITHIN * scale:
            raise UnsupportedModelError(
                f"'{self.key.name}' is not linear in cos and sin of its positions; set kv_cache.center: false"
            )
        constant = not widths or bool(np.abs(still).max() > 0)
        if constant:
            columns = np.concatenate([columns, still[:, None]], axis=1)
        return columns.transpose(0, 2, 1), constant

    def _evaluate(self, mean: Array, angles: Sequence[Array]) -> Array:
        """Return keys [Hk, N, D] of one source vector [Hk, D] at N rows of angles."""
        if self.key is self.source:
            return np.broadcast_to(mean[:, None].astype(np.float64), (mean.shape[0], 2, mean.shape[1]))
        shape = (1, mean.shape[0], len(angles[0]), mean.shape[1])
        feeds = {self.source.name: np.broadcast_to(mean[None, :, None], shape)}
        feeds |= {t.name: rows[None] for t, rows in zip(self.angles, angles, strict=True)}
        ends = (self.source, *self.angles)
        part = gs.Graph(_between(self.key, ends), list(ends), [self.key], opset=23)
        for tensor in part.tensors().values():
            if isinstance(tensor, gs.Constant):  # a rotation's tables may wait in a file
                tensor.values = weight_of(tensor).read()
        typed = {tensor.name: feeds[tensor.name].astype(tensor.dtype) for tensor in ends}
        keys: Array = ReferenceEvaluator(to_proto(part)).run(None, typed)[0][0].astype(np.float64)
        return keys


def key_path(positions: Positions, key: gs.Variable) -> KeyPath:
    """Find where a key [B, Hk, S, D] meets its position.

    Raises:
        UnsupportedModelError: position-free parts of the key join behind that place.

    """
    ends = [tensor for tensor in positions.moving(key) if isinstance(tensor, gs.Variable)]
    sources = [tensor for tensor in ends if not positions.reach(tensor)]
    if len(sources) != 1 or list(sources[0].shape[1:]) != list(key.shape[1:]):
        raise UnsupportedModelError(
            f"'{key.name}' is put together from {len(sources)} tensors where positions turn it, so its mean "
            "is not known; set kv_cache.center: false"
        )
    return KeyPath(sources[0], tuple(tensor for tensor in ends if positions.reach(tensor)), key)


def _between(key: gs.Variable, ends: Sequence[gs.Variable]) -> list[gs.Node]:
    """Return the nodes that make `key` from `ends` and constants, in order."""
    found: dict[int, gs.Node] = {}

    def visit(tensor: gs.Variable | gs.Constant) -> None:
        node = producer(tensor)
        if node is not None and not any(tensor is end for end in ends) and id(node) not in found:
            for source in node.inputs:
                visit(source)
            found[id(node)] = node

    visit(key)
    return list(found.values())
