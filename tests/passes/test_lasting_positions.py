"""Angles at positions where float32 products have lost them."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.graphs import ops, parse, run
from support.tiny import tiny_model

from rotexport.checkpoint import open_checkpoint
from rotexport.export import export
from rotexport.passes.lasting_positions import LAST_POSITION, LastingPositions

FREQUENCIES = (1e5 ** (-np.arange(8) / 8)).astype(np.float32)
POSITIONS = np.array(
    [[0, 1, 4095, 4096, 8191, 1_000_003], [10_000_019, 12_345_678, 16_000_000, LAST_POSITION, 7, 77]]
)


def rope(shape: str = "batch, sequence, 1", axes: str = "-1") -> gs.Graph:
    text = f"""rope (int64[batch, sequence] position_ids) => (float[batch, sequence, 8] cosine, float[batch, sequence, 8] sine)
    <int64[1] axes = {{{axes}}}> {{
        column = Unsqueeze(position_ids, axes)
        real = Cast<to = 1>(column)
        angle = Mul(real, f)
        cosine = Cos(angle)
        sine = Sin(angle)
    }}""".replace("(int64[batch", "(float[8] f, int64[batch")
    graph = parse(text)
    frequencies = graph.inputs.pop(0)
    frequencies.to_constant(FREQUENCIES)
    return graph


def exact() -> list[np.ndarray]:
    angles = POSITIONS[..., None] * FREQUENCIES.astype(np.longdouble)
    return [np.cos(angles), np.sin(angles)]


def test_angles_are_right_beyond_ten_million() -> None:
    graph = rope()
    lost = run(graph, position_ids=POSITIONS)
    assert LastingPositions().run(graph).changed == 1
    kept = run(graph, position_ids=POSITIONS)
    for found, right in zip(kept, exact(), strict=True):
        np.testing.assert_allclose(found, right.astype(np.float64), rtol=0, atol=3e-7)
    assert np.abs(lost[0] - exact()[0]).max() > 0.01, "which float32 products are not"


def test_only_operators_and_types_that_tensorrt_accepts() -> None:
    graph = rope()
    LastingPositions().run(graph)
    assert set(ops(graph)) <= {"Unsqueeze", "Squeeze", "Div", "Mod", "Gather", "Mul", "Add", "Sub"}
    tables = [t for t in graph.tensors().values() if isinstance(t, gs.Constant) and t.values.size > 1]
    assert {t.dtype for t in tables} == {np.dtype(np.float32)}
    assert sum(t.values.nbytes for t in tables) == 4 * 4096 * 8 * 4


def test_exported_models_share_one_pair_of_tables() -> None:
    graph = export(open_checkpoint(tiny_model("llama")))
    assert LastingPositions().run(graph).changed == 1
    assert "Cos" not in ops(graph)


@pytest.mark.parametrize("axes", ["1"])
def test_angles_in_another_layout_are_left_alone(axes: str) -> None:
    graph = rope(axes=axes)
    before = ops(graph)
    assert LastingPositions().run(graph).changed == 0
    assert ops(graph) == before
