"""The examples in `graphs/passes`: what each pass does to a graph that a person can read.

`NAME.after.onnxtxt` is what the pass makes of `NAME.before.onnxtxt`. After a change that is meant, run this
file as a program to write the after-texts again, and read the difference.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.graphs import parse

from rotexport.graph.edit import sort
from rotexport.graph.io import WeightFile, save_model
from rotexport.passes.base import Pass
from rotexport.passes.center_layernorms import CenterLayerNorms
from rotexport.passes.correct_head import CorrectHead
from rotexport.passes.fold_norms import FoldNorms
from rotexport.passes.fuse_key_rotations import FuseKeyRotations
from rotexport.passes.lasting_positions import LastingPositions
from rotexport.passes.place_linears import PlaceLinears
from rotexport.passes.precision import SetPrecision
from rotexport.passes.quantize_activations import QuantizeActivations
from rotexport.passes.quantize_cache import QuantizeCache
from rotexport.passes.quantize_weights import QuantizeWeights
from rotexport.passes.rotate_heads import RotateHeads
from rotexport.passes.rotate_inputs import MixHeads, RotateDownInputs
from rotexport.passes.rotate_residual import RotateResidual
from rotexport.passes.share_weights import ShareWeights
from rotexport.passes.smooth_inputs import SmoothDownInputs
from rotexport.passes.stream_attention import StreamAttention
from rotexport.passes.transform_heads import TransformKeys, TransformValues
from rotexport.passes.transform_inputs import TransformInputs
from rotexport.quant.operators import with_operators
from rotexport.quant.plan import SitePlan
from rotexport.quant.scheme import ActivationScheme, CacheScheme, WeightScheme
from rotexport.recipe import Rotation
from rotexport.streaming.scheme import AttentionScheme
from rotexport.transforms.transform import Identity, InvertibleMatrix, KroneckerPair, ScaledKronecker

FOLDER = Path(__file__).parents[2] / "graphs" / "passes"
HADAMARD = Rotation("hadamard")
INT4 = SitePlan("0.up", "y", 4, WeightScheme("int4", group=2, method="rtn"), ActivationScheme())
INT8 = SitePlan("0.up", "y", 4, WeightScheme("int8"), ActivationScheme("int8", "dynamic"))
PLACED = with_operators(
    [
        SitePlan(
            "0.down", "product", 16, WeightScheme("int8", method="rtn"), ActivationScheme("int8", "dynamic")
        )
    ]
)
SHEAR = InvertibleMatrix(np.array([[1.0, 1.0], [0.0, 1.0]]))
LEARNED = ScaledKronecker(None, KroneckerPair(SHEAR, InvertibleMatrix(np.array([[2.0, 0.0], [1.0, 1.0]]))))
BEHIND: dict[str, Pass] = {"place-linears": QuantizeWeights(PLACED)}  # what must have run before
PASSES: dict[str, Pass] = {
    rewrite.name: rewrite
    for rewrite in (
        CenterLayerNorms(),
        FoldNorms(),
        SmoothDownInputs({"down": np.array([1.0, 1.0, 4.0, 1.0])}),
        RotateResidual(HADAMARD),
        RotateHeads(HADAMARD, "r2"),
        RotateHeads(HADAMARD, "r3"),
        RotateDownInputs(HADAMARD),
        MixHeads(),
        TransformInputs({("up", "up.2"): LEARNED}),
        TransformValues({0: SHEAR}),
        TransformKeys({0: ScaledKronecker(None, KroneckerPair(Identity(1), SHEAR))}),
        CorrectHead(np.array([[1.0, 0.0], [0.5, 1.0]])),
        SetPrecision(np.dtype(np.float16)),
        QuantizeWeights([INT4]),
        PlaceLinears(PLACED),
        QuantizeActivations([INT8], {}),
        QuantizeCache(CacheScheme("int8", "none")),
        StreamAttention(AttentionScheme("streaming", sinks=1, window=3)),
        LastingPositions(step=4, steps=4),
        FuseKeyRotations(),
        ShareWeights(),
    )
}


def before(name: str):
    graph = parse(_text(FOLDER / f"{name}.before.onnxtxt"))
    for node in graph.nodes:
        node.name = node.outputs[0].name
    return graph


def after(name: str):
    graph = before(name)
    if name in BEHIND:
        BEHIND[name].run(graph)
    assert PASSES[name].run(graph).changed, "an example of nothing"
    sort(graph)
    return graph


def readable(graph) -> str:
    """Return a graph as ONNX text, values in place (six decimals), without the bodies of custom operators."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_model(graph, path, WeightFile(Path(folder) / "data"))
        model = onnx.load(path)
    del model.functions[:]
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            values = np.round(values, 6) + 0.0  # no negative zeros
        flat = [value.item() for value in values.reshape(-1)]
        tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, flat))
    return onnx.printer.to_text(model) + "\n"


def _text(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith(("#", "<ir_version")))


@pytest.mark.parametrize("name", PASSES)
def test_the_example_shows_what_the_pass_does(name: str) -> None:
    assert readable(after(name)) == (FOLDER / f"{name}.after.onnxtxt").read_text()


if __name__ == "__main__":
    for name in PASSES:
        (FOLDER / f"{name}.after.onnxtxt").write_text(readable(after(name)))
        print(name, file=sys.stderr)
