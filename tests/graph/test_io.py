"""Saved graphs hold each tensor once, and scratch files go when nobody needs them."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from support.graphs import graph_of, run

from rotexport.errors import GraphError, OutputError
from rotexport.graph.io import Scratch, WeightFile, load_model, save_model
from rotexport.graph.weights import Affine, InMemory, Stored, constant, set_weight, weight_of

TEXT = """
two (float[2, 64] x, float[64, 64] W1, float[64, 64] W2) => (float[2, 64] y) {
    a = MatMul(x, W1)
    y = MatMul(a, W2)
}"""


def test_what_is_saved_is_what_is_computed(tmp_path) -> None:
    graph = graph_of(TEXT)
    matrices = [node.inputs[1].values for node in graph.nodes]
    x = np.ones((2, 64), np.float32)
    np.testing.assert_allclose(run(graph, x=x)[0], x @ matrices[0] @ matrices[1], rtol=1e-4, atol=1e-3)


def test_equal_weights_share_their_bytes(tmp_path) -> None:
    graph = graph_of(TEXT)
    first, second = (node.inputs[1] for node in graph.nodes)
    set_weight(second, InMemory(first.values.copy()))
    save_model(graph, tmp_path / "model.onnx", WeightFile(tmp_path / "model.data"))
    assert (tmp_path / "model.data").stat().st_size == 64 * 64 * 4
    onnx.checker.check_model(str(tmp_path / "model.onnx"))


def test_four_bit_elements_are_packed_low_nibble_first(tmp_path) -> None:
    values = np.arange(-8, 8).astype(ml_dtypes.int4)
    graph = graph_of("cast (float x) => (float y) { y = Identity(x) }")
    codes = constant("codes", InMemory(np.tile(values, 256)))
    file = WeightFile(tmp_path / "model.data")
    place = file.add(weight_of(codes))
    assert place.length == 2048
    proto = onnx.TensorProto(
        data_type=onnx.TensorProto.INT4, dims=[16], raw_data=file.find(weight_of(codes))[:8].tobytes()
    )
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(proto).astype(np.int8), np.arange(-8, 8))
    del graph


def test_an_unwritable_place_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(OutputError, match=r"cannot write '.*missing/model\.data'"):
        WeightFile(tmp_path / "missing" / "model.data")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_clear_error(tmp_path) -> None:
    (tmp_path / "model.data").symlink_to("/dev/full")
    with pytest.raises(
        OutputError, match=r"cannot write 4096 bytes to .*No space left on device; free space"
    ):
        WeightFile(tmp_path / "model.data").add(InMemory(np.ones(1024, np.float32)))


def test_scratch_writes_what_changed_and_drops_what_is_no_longer_used(tmp_path) -> None:
    graph = graph_of(TEXT)
    first, second = (node.inputs[1] for node in graph.nodes)
    scratch = Scratch(tmp_path)
    save_model(graph, tmp_path / "pass.onnx", scratch)
    scratch.retire(graph)
    set_weight(first, Affine(weight_of(first), factor=2.0))
    save_model(graph, tmp_path / "pass.onnx", scratch)
    assert (tmp_path / "scratch-1.data").stat().st_size == 64 * 64 * 4
    scratch.retire(graph)
    assert (tmp_path / "scratch-0.data").exists()  # the second matrix is still there
    set_weight(second, Affine(weight_of(second), factor=2.0))
    save_model(graph, tmp_path / "pass.onnx", scratch)
    scratch.retire(graph)
    assert not (tmp_path / "scratch-0.data").exists()


def test_a_final_file_copies_what_scratch_has_evaluated(tmp_path) -> None:
    weight = InMemory(np.arange(1024, dtype=np.float32))
    scratch = Scratch(tmp_path)
    scratch.add(weight)
    final = WeightFile(tmp_path / "model.data", source=scratch)
    final.add(weight)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "model.data", np.float32), weight.array)


def test_a_saved_graph_is_read_back_lazily(tmp_path) -> None:
    graph = graph_of(TEXT)
    save_model(graph, tmp_path / "model.onnx", WeightFile(tmp_path / "model.data"))
    again = load_model(tmp_path / "model.onnx")
    assert all(isinstance(weight_of(node.inputs[1]), Stored) for node in again.nodes)
    x = np.ones((2, 64), np.float32)
    np.testing.assert_array_equal(run(again, x=x)[0], run(graph, x=x)[0])


def test_missing_data_is_one_clear_error(tmp_path) -> None:
    save_model(graph_of(TEXT), tmp_path / "model.onnx", WeightFile(tmp_path / "model.data"))
    (tmp_path / "model.data").write_bytes(b"short")
    with pytest.raises(GraphError, match="which holds 5; copy the data file"):
        load_model(tmp_path / "model.onnx")
