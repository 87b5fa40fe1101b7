"""Weights into graphs, as lazy constants."""

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.graphs import ops, parse

from rotexport.errors import CheckpointError
from rotexport.export.bind import bind_weights
from rotexport.graph.weights import Affine, InMemory, Transposed, Weight, weight_of

GRAPH = """
layer (float[batch, 3] x, int64[batch] ids, float[4, 3] matrix, float[4] gamma, float[4, 3] table)
    => (float[batch, 4] y, float[batch, 4] z, float[batch, 3] e)
<float one = {1.0}>
{
    turned = Transpose<perm = [1, 0]>(matrix)
    product = MatMul(x, turned)
    scale = Add(gamma, one)
    y = RMSNormalization<axis = -1>(product, scale)
    tied = Transpose<perm = [1, 0]>(table)
    z = MatMul(x, tied)
    e = Gather(table, ids)
}"""


def weights(**replaced: np.ndarray) -> Callable[[str], Weight]:
    arrays = {
        "matrix": np.arange(12, dtype=np.float32).reshape(4, 3),
        "gamma": np.array([0.5, 0, -1, 2], np.float16),
        "table": np.ones((4, 3), np.float32),
    } | replaced
    return lambda name: InMemory(arrays[name])


def bound() -> gs.Graph:
    graph = parse(GRAPH)
    bind_weights(graph, 2, weights())
    return graph


def test_a_transposed_weight_is_an_expression_under_its_own_name() -> None:
    matrix = bound().tensors()["matrix"]
    assert isinstance(weight_of(matrix), Transposed)
    np.testing.assert_array_equal(matrix.values, np.arange(12).reshape(4, 3).T)


def test_a_scale_of_one_plus_gamma_is_a_float32_constant() -> None:
    gamma = bound().tensors()["gamma"]
    assert isinstance(weight_of(gamma), Affine)
    assert gamma.dtype == np.float32
    np.testing.assert_array_equal(gamma.values, [1.5, 1, 0, 3])


def test_a_matrix_that_is_also_a_table_is_there_twice() -> None:
    tensors = bound().tensors()
    assert tensors["table"].shape == (4, 3)
    assert tensors["table.transposed"].shape == (3, 4)
    assert weight_of(tensors["table.transposed"]) == Transposed(weight_of(tensors["table"]))


def test_what_computes_with_activations_stays() -> None:
    graph = bound()
    assert ops(graph) == ["MatMul", "RMSNormalization", "MatMul", "Gather"]
    assert [tensor.name for tensor in graph.inputs] == ["x", "ids"]


def test_a_weight_that_does_not_fit_the_config_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"'matrix' has shape \(3, 3\); the config makes it \(4, 3\)"):
        bind_weights(parse(GRAPH), 2, weights(matrix=np.ones((3, 3), np.float32)))
