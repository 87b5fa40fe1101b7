"""Everything FlatQuant learns for a block leaves the float block as it is, trained or exported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny import tiny_model

from rotexport.blocks.calibration import Network
from rotexport.blocks.split import split_blocks
from rotexport.blocks.torch_block import Edits, TorchBlock
from rotexport.checkpoint import open_checkpoint
from rotexport.export import export
from rotexport.graph.basis import analyse
from rotexport.learning.flat_block import FlatBlock, Quantizers, value_path
from rotexport.learning.rotations import quantizers
from rotexport.pipeline import Pipeline, affine_passes, plan_sites, rotation_passes
from rotexport.recipe import from_mapping

LENGTH = 12
WINDOW = np.random.default_rng(0).integers(3, 90, LENGTH)
RECIPE = {
    "dtype": "fp32",
    "weights": {"format": "int4", "method": "rtn"},
    "activations": {"format": "int4", "mode": "dynamic"},
    "kv_cache": {"key": "int4", "value": "int4"},
    "learn_affine": {"steps": 1, "clip_rate": 0.05},
}
ODD = {"hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 42}
MODELS = {"llama": {}, "llama-odd": {**ODD, "head_dim": 6}, "qwen2": {}, "opt": {}}


def network_of(name: str, recipe=RECIPE) -> Network:
    parsed = from_mapping(recipe)
    model = tiny_model(name.partition("-")[0], initializer_range=0.3, **MODELS[name])
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    graph = export(open_checkpoint(model))
    plan = plan_sites(graph, parsed)
    Pipeline(graph, None).run(rotation_passes(parsed.rotations), lambda name: None)
    return Network(graph, plan, {}, parsed)


def shaken(network: Network, block: TorchBlock, rounding: bool) -> FlatBlock:
    """Transforms as training might leave them, with or without quantizers behind them."""
    weights, edits = quantizers(network, block.block, learn_clips=True)
    if rounding:
        standing = Quantizers(edits.inputs, weights, edits.attention)
    else:
        passing = torch.nn.Identity()
        passing.logit = None
        standing = Quantizers(
            dict.fromkeys(edits.inputs, passing), {}, dict.fromkeys(edits.attention, passing)
        )
    generator = torch.Generator().manual_seed(block.block.index)
    scales = {
        group: torch.rand(len(block.weights[group[0]]), generator=generator) + 0.5 for group in block.groups
    }
    module = FlatBlock(block, value_path(block, analyse(network.graph)), scales, standing, seed=3)
    with torch.no_grad():
        for parameter in module.transform_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return module


@pytest.mark.parametrize("name", MODELS)
def test_the_float_block_stays_whatever_was_learned(name: str) -> None:
    network = network_of(name)
    split = split_blocks(network.graph)
    context, x = split.context(LENGTH), split.embed(WINDOW)
    blocks = [TorchBlock(graph) for graph in split.blocks]
    flat = [shaken(network, block, rounding=False) for block in blocks]
    outputs = [x]
    with torch.no_grad():
        for block, module in zip(blocks, flat, strict=True):
            outputs.append(block(outputs[-1], context))
            transformed = module(outputs[-2], context)
            limit = 2e-4 * outputs[-1].abs().max().item()
            torch.testing.assert_close(transformed, outputs[-1], atol=limit, rtol=0)
    assert all(module.keys is not None and module.values is not None for module in flat)
    assert all(module.mixed == (f"{place}.output",) for place, module in enumerate(flat))
    learned = flat[0].export() | flat[1].export()
    pipeline = Pipeline(network.graph, None)
    pipeline.run(affine_passes(learned), lambda name: None)
    after = split_blocks(network.graph)
    for place, graph in enumerate(after.blocks):
        with torch.no_grad():
            result = TorchBlock(graph)(outputs[place], after.context(LENGTH))
        limit = 2e-4 * outputs[place + 1].abs().max().item()
        torch.testing.assert_close(result, outputs[place + 1], atol=limit, rtol=0)
    where = {p.site: p.where.value for p in pipeline.placements}
    assert where["0.value"] == "folded" or where["0.query"] == "online"
    assert {(p.site, p.where.value) for p in pipeline.placements} >= {
        ("0.value", "folded"),
        ("0.key", "online"),
        ("0.output", "online"),
        ("1.down", "online"),
    }


def test_the_exported_block_computes_what_was_trained() -> None:
    network = network_of("llama")
    split = split_blocks(network.graph)
    block, x = TorchBlock(split.blocks[0]), split.embed(WINDOW)
    module = shaken(network, block, rounding=True)
    with torch.no_grad():
        for parameter in module.clip_parameters():
            parameter.fill_(4.0)
        trained = module(x, split.context(LENGTH))
        exact = block(x, split.context(LENGTH))
    Pipeline(network.graph, None).run(affine_passes(module.export()), lambda name: None)
    after = split_blocks(network.graph)
    weights, edits = quantizers(network, after.blocks[0], learn_clips=True)
    with torch.no_grad():
        exported = TorchBlock(after.blocks[0])(
            x, after.context(LENGTH), Edits(edits.inputs, weights, edits.attention)
        )
    # Transforms folded in float64 put a code here and there on the other side of a tie.
    assert (exported - trained).norm() < 0.2 * (trained - exact).norm()


def test_without_a_quantized_cache_keys_have_no_transform_and_values_one_for_the_output() -> None:
    network = network_of("llama", {**RECIPE, "kv_cache": {}})
    module = shaken(network, TorchBlock(split_blocks(network.graph).blocks[0]), rounding=True)
    assert module.keys is None and module.values is not None and module.heads is not None


def test_values_that_rotate_online_leave_the_output_a_transform_of_its_own() -> None:
    network = network_of("llama", {**RECIPE, "learn_affine": {}, "rotations": {"o_heads": "hadamard"}})
    block = TorchBlock(split_blocks(network.graph).blocks[0])
    assert value_path(block, analyse(network.graph)) is None
    module = shaken(network, block, rounding=True)
    assert module.mixed is None and module.values is None and ("0.output",) in module.affine
