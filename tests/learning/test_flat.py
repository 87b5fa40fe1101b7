"""FlatQuant's transforms lower a quantized block's error, and leave the float graph as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import tiny_model

from rotexport.blocks.calibration import Network
from rotexport.blocks.split import split_blocks
from rotexport.blocks.torch_block import Edits, TorchBlock
from rotexport.build import BuildOptions, build
from rotexport.checkpoint import open_checkpoint
from rotexport.errors import RecipeError
from rotexport.export import export
from rotexport.learning.flat import learn_affine
from rotexport.learning.rotations import quantizers
from rotexport.passes.transform_inputs import TransformInputs
from rotexport.pipeline import Pipeline, plan_sites
from rotexport.recipe import from_mapping
from rotexport.runtime.model import OnnxModel

LENGTH = 16
WINDOWS = np.random.default_rng(0).integers(3, 90, (6, LENGTH))
RECIPE = {
    "dtype": "fp32",
    "weights": {"format": "int4", "method": "rtn"},
    "activations": {"format": "int4", "mode": "dynamic"},
    "learn_affine": {"steps": 60, "batch": 3, "rate": 0.02, "windows": 6},
    "calibration_windows": 6,
}


def block_error(network: Network, expected: torch.Tensor) -> float:
    split = split_blocks(network.graph)
    weights, edits = quantizers(network, split.blocks[0])
    block, x = TorchBlock(split.blocks[0]), torch.cat([split.embed(window) for window in WINDOWS])
    with torch.no_grad():
        result = block(x, split.context(LENGTH), Edits(edits.inputs, weights, edits.attention))
    return float((result - expected).norm() / expected.norm())


def test_learned_transforms_keep_the_float_block_and_help_the_quantized_one(tmp_path: Path) -> None:
    recipe = from_mapping(RECIPE)
    graph = export(open_checkpoint(tiny_model("llama", initializer_range=0.3)))
    network = Network(graph, plan_sites(graph, recipe), {}, recipe)
    split = split_blocks(graph)
    x, context = torch.cat([split.embed(window) for window in WINDOWS]), split.context(LENGTH)
    expected = TorchBlock(split.blocks[0])(x, context).detach()
    before = block_error(network, expected)
    learned = learn_affine(network, WINDOWS, tmp_path)
    assert set(learned) == {group for block in split.blocks for group in TorchBlock(block).groups}
    Pipeline(graph, None).run([TransformInputs(learned)], lambda name: None)
    after = TorchBlock(split_blocks(graph).blocks[0])(x, context).detach()
    torch.testing.assert_close(after, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    assert block_error(network, expected) < 0.9 * before


def test_a_build_with_learned_transforms_runs(tmp_path: Path) -> None:
    quick = {**RECIPE, "learn_affine": {**RECIPE["learn_affine"], "steps": 2}}
    report = build(tiny_model("llama"), tmp_path / "out", from_mapping(quick), BuildOptions(validate=False))
    assert {t.rotation for t in report.transforms} == {"affine"}
    logits = OnnxModel(tmp_path / "out" / "model.onnx").run(WINDOWS[:1])["logits"]
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotations": {"r4": "hadamard"}}, "same inputs"),
        ({"activations": {}}, "become integers"),
        ({"learn_affine": {"steps": -1}}, "steps: -1"),
        ({"learn_affine": {"steps": 1, "rate": 2}}, "rate: 2"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        from_mapping({**RECIPE, **change})
