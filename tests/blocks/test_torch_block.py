"""Blocks cut from real graphs compute in PyTorch what ONNX Runtime computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.graphs import graph_of
from support.models import decoder
from support.tiny import tiny_model

from rotexport.blocks.split import split_blocks
from rotexport.blocks.torch_block import Edits, TorchBlock
from rotexport.checkpoint import open_checkpoint
from rotexport.errors import GraphError
from rotexport.export import export
from rotexport.graph.io import Scratch, save_model
from rotexport.pipeline import Pipeline, rotation_passes
from rotexport.recipe import load_recipe
from rotexport.runtime.model import OnnxModel

TOKENS = np.random.default_rng(0).integers(3, 90, 20)


def rotated_graph(model_type: str):
    graph = export(open_checkpoint(tiny_model(model_type)))
    Pipeline(graph, None).run(
        rotation_passes(load_recipe("quarot-w4a8kv4").rotations), announce=lambda name: None
    )
    return graph


def onnx_streams(graph, names: list[str], folder: Path) -> dict[str, np.ndarray]:
    save_model(graph, folder / "model.onnx", Scratch(folder))
    model = OnnxModel(folder / "model.onnx", extra_outputs=names)
    return model.run(TOKENS[None], outputs=names)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "opt", "gpt2"])
def test_every_architecture_block_by_block(model_type: str, tmp_path: Path) -> None:
    graph = rotated_graph(model_type)
    split = split_blocks(graph)
    streams = onnx_streams(graph, [split.blocks[0].input, *(b.output for b in split.blocks)], tmp_path)
    context = split.context(len(TOKENS))
    torch.testing.assert_close(split.embed(TOKENS), torch.tensor(streams["block.0.input"]))
    for block in split.blocks:
        # The true input twice: the context has batch 1 and must serve every batch.
        x = torch.tensor(streams[block.input]).repeat(2, 1, 1)
        y = TorchBlock(block)(x, context)
        expected = streams[block.output]
        for row in y:
            # Float32 sums in another order: about 1e-6 of the largest value.
            np.testing.assert_allclose(row, expected[0], atol=5e-6 * np.abs(expected).max())


def test_stepwise_evaluation_is_the_whole_evaluation() -> None:
    split = split_blocks(rotated_graph("llama"))
    context, x = split.context(len(TOKENS)), split.embed(TOKENS)
    block = TorchBlock(split.blocks[0])
    assert block.groups == (("0.query", "0.key", "0.value"), ("0.output",), ("0.gate", "0.up"), ("0.down",))
    values = block.begin(x, context)
    seen = []
    for group in block.groups:
        block.advance(values, block.input_of[group[0]])
        seen.append(values[block.input_of[group[0]]])
    block.advance(values, block.block.output)
    torch.testing.assert_close(values[block.block.output], block(x, context), atol=0, rtol=0)
    inputs = block.run(block.begin(x, context), [block.input_of[group[0]] for group in block.groups])
    for stepped, whole in zip(seen, inputs.values(), strict=True):
        torch.testing.assert_close(stepped, whole, atol=0, rtol=0)


def test_edits_reach_each_product_and_shared_ones_run_once() -> None:
    split = split_blocks(rotated_graph("llama"))
    context, x = split.context(len(TOKENS)), split.embed(TOKENS)
    block = TorchBlock(split.blocks[0])
    calls = []

    def double(values: torch.Tensor) -> torch.Tensor:
        calls.append(values.shape)
        return 2 * values

    halved = Edits(dict.fromkeys(block.groups[0], double), {s: lambda w: w / 2 for s in block.groups[0]})
    # Powers of two cancel exactly.
    torch.testing.assert_close(block(x, context, halved), block(x, context), atol=0, rtol=0)
    assert len(calls) == 1
    plain = block(x, context)
    for edits in (
        Edits(inputs={"0.down": lambda v: 2 * v}),
        Edits(weights={"0.gate": lambda w: 2 * w}),
        Edits(attention={"key": lambda k: 2 * k}),
        Edits(attention={"value": lambda v: 2 * v}),
    ):
        assert (block(x, context, edits) - plain).abs().max() > 1e-6


def test_gradients_agree_with_finite_differences() -> None:
    split = split_blocks(rotated_graph("llama"))
    context, x = split.context(8), split.embed(TOKENS[:8])
    block = TorchBlock(split.blocks[0])
    block.weights = {site: 30 * weight for site, weight in block.weights.items()}  # far from linear
    factor = torch.ones((), requires_grad=True)

    def loss(value: torch.Tensor) -> torch.Tensor:
        edits = Edits(inputs={"0.query": lambda v: v * value}, weights={"0.down": lambda w: w * value})
        return block(x, context, edits).square().sum()

    loss(factor).backward()
    step = 1e-2
    with torch.no_grad():
        slope = (loss(factor + step) - loss(factor - step)) / (2 * step)
    assert factor.grad is not None
    # Central differences of a smooth function: an error of order step squared.
    torch.testing.assert_close(factor.grad, slope, rtol=2e-3, atol=0)


def test_a_block_that_reads_the_tokens_besides_its_input_is_refused() -> None:
    text = decoder(1).replace(
        "b0_mid = Add(block__0__input,",
        "b0_side = Gather<axis = 0>(Embedding, input_ids)\n b0_mid = Add(b0_side,",
    )
    with pytest.raises(GraphError, match=r"block 0 reads 'b0_side', which depends on the tokens"):
        split_blocks(graph_of(text))
    split_blocks(graph_of(decoder(1)))


@pytest.mark.parametrize(("model_type", "joining"), [("llama", True), ("gpt2", True), ("gemma2", False)])
def test_which_sums_a_blocks_products_enter_as_they_are(model_type: str, joining: bool) -> None:
    block = TorchBlock(split_blocks(export(open_checkpoint(tiny_model(model_type)))).blocks[0])
    sums = {block.role_of[site]: block.sum_of(site) for site in block.role_of}
    joined = [sums.pop("output"), sums.pop("down")]
    if joining:  # a bias may lie between
        assert joined[0] not in (None, block.block.output)
        assert joined[1] == block.block.output
    else:  # norms do
        assert joined == [None, None]
    assert not any(sums.values())


def test_attention_and_mlp_in_parallel_enter_one_sum() -> None:
    block = TorchBlock(split_blocks(export(open_checkpoint(tiny_model("gpt_neox")))).blocks[0])
    sums = {block.role_of[site]: block.sum_of(site) for site in block.role_of}
    assert sums["output"] == sums["down"] == block.block.output
