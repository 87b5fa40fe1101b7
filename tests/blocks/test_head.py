"""What the head takes up of the blocks' error: least squares, better logits, and nothing where nothing is wrong."""

from __future__ import annotations

import numpy as np
import torch
from support.tiny import tiny_model

from rotexport.blocks.calibration import Network, quantized_weights, run_blocks
from rotexport.blocks.head import CorrectedHead, head_correction
from rotexport.blocks.split import split_blocks
from rotexport.blocks.torch_block import TorchBlock
from rotexport.checkpoint import open_checkpoint
from rotexport.export import export
from rotexport.graph.sites import linears
from rotexport.graph.weights import weight_of
from rotexport.pipeline import plan_sites
from rotexport.recipe import from_mapping

WINDOWS = np.random.default_rng(0).integers(3, 90, (12, 64))
INT4 = {"dtype": "fp32", "weights": {"format": "int4", "group": 32}}


def network_of(mapping) -> Network:
    recipe = from_mapping(mapping)
    graph = export(open_checkpoint(tiny_model("llama", hidden_size=64, intermediate_size=128)))
    return Network(graph, plan_sites(graph, recipe), {}, recipe)


def corrected(network: Network, windows, ridge: float) -> CorrectedHead:
    return head_correction(split_blocks(network.graph), run_blocks(network, {}, windows), ridge)


def head_inputs(network: Network, windows, *, quantized: bool) -> np.ndarray:
    split = split_blocks(network.graph)
    with torch.no_grad():
        x = torch.cat([split.embed(window) for window in windows])
        for part in split.blocks:
            block = TorchBlock(part)
            if quantized:
                block.weights |= quantized_weights(network, {}, block)
            x = block(x, split.context(windows.shape[1]))
        return split.head_inputs(x).flatten(0, 1).double().numpy()


def test_it_is_the_ridge_regression_of_the_float_states_on_the_quantized_ones() -> None:
    network, ridge = network_of(INT4), 0.05
    inputs, wanted = (head_inputs(network, WINDOWS, quantized=flag) for flag in (True, False))
    found = corrected(network, WINDOWS, ridge)
    # |x̂ (I + D) - x|² + λ |D|² as one least-squares problem, its penalty as rows of their own.
    weight = np.sqrt(ridge * np.mean(np.sum(inputs**2, 0)))
    rows = np.concatenate([inputs, weight * np.eye(64)])
    change = np.linalg.lstsq(rows, np.concatenate([wanted - inputs, np.zeros((64, 64))]), rcond=None)[0]
    expected = np.eye(64) + change
    np.testing.assert_allclose(found.matrix, expected, atol=2e-5)  # sums of a batch are in float32
    errors = [np.square(inputs @ m - wanted).sum() / np.square(wanted).sum() for m in (np.eye(64), expected)]
    np.testing.assert_allclose([found.before, found.after], errors, rtol=1e-3)


def test_logits_come_nearer_the_float_networks_on_other_text() -> None:
    network = network_of(INT4)
    matrix = corrected(network, WINDOWS[:10], 0.1).matrix
    inputs, wanted = (head_inputs(network, WINDOWS[10:], quantized=flag) for flag in (True, False))
    head = weight_of(next(site for site in linears(network.graph) if site.role == "head").weight).read()
    errors = [np.square((inputs @ change - wanted) @ head).sum() for change in (np.eye(64), matrix)]
    assert errors[1] < 0.9 * errors[0]


def test_a_network_without_error_keeps_its_head() -> None:
    network = network_of({"dtype": "fp32"})
    found = corrected(network, WINDOWS[:2], 0.1)
    np.testing.assert_allclose(found.matrix, np.eye(64), atol=1e-6)
