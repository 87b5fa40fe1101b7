"""The error of every block after a step, measured with the block quantized alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny import tiny_model

from rotexport.blocks.calibration import Network
from rotexport.blocks.split import split_blocks
from rotexport.blocks.steps import step_errors
from rotexport.blocks.torch_block import Edits, TorchBlock
from rotexport.checkpoint import open_checkpoint
from rotexport.export import export
from rotexport.passes.quantize_weights import quantizer_of
from rotexport.pipeline import plan_sites
from rotexport.recipe import from_mapping

LENGTH = 16
WINDOWS = np.random.default_rng(0).integers(3, 90, (2, LENGTH))
RECIPE = {
    "dtype": "fp32",
    "weights": {"format": "int4", "method": "search"},
    "activations": {"format": "int8", "mode": "static"},
}


def quiet(done: int, of: int) -> None:
    pass


@pytest.fixture(scope="module")
def network() -> Network:
    recipe = from_mapping(RECIPE)
    graph = export(open_checkpoint(tiny_model("llama", initializer_range=0.3)))
    return Network(graph, plan_sites(graph, recipe), {}, recipe)


def activations(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-128, 127) * scale


def weights(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(0) / 7
    return (weight / scale).round().clamp(-8, 7) * scale


def test_each_block_is_quantized_alone_behind_the_float_network(network: Network) -> None:
    found = step_errors("as exported", network, {}, WINDOWS, quiet)
    assert found.step == "as exported"
    split = split_blocks(network.graph)
    context, expected = split.context(LENGTH), []
    x = torch.cat([split.embed(window) for window in WINDOWS])
    with torch.no_grad():
        for graph in split.blocks:
            block = TorchBlock(graph)
            names = list(block.weights)
            edits = Edits(dict.fromkeys(names, activations), dict.fromkeys(names, weights))
            output = block(x, context)
            wrong = (block(x, context, edits) - output).square().sum(-1) / output.square().sum(-1)
            expected.append(float(wrong.mean()))
            x = output
    assert found.blocks == pytest.approx(expected, rel=0.02)  # a code on the other side of a tie


def test_chosen_weights_take_the_place_of_rounded_ones(network: Network) -> None:
    rounded = step_errors("before", network, {}, WINDOWS, quiet).blocks
    site = next(site for site in network.plan if site.site == "1.down")
    wide = quantizer_of(replace(site, weights=replace(site.weights, format="int8")))
    chosen = step_errors("after", network, {"1.down": wide}, WINDOWS, quiet).blocks
    assert chosen[0] == rounded[0]
    assert chosen[1] < rounded[1]
