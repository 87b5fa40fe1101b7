"""Clips of activations are searched per input, against the products that read it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny import tiny_model

from rotexport.blocks.calibration import Network
from rotexport.blocks.clips import search_clips
from rotexport.blocks.split import split_blocks
from rotexport.blocks.torch_block import TorchBlock
from rotexport.checkpoint import open_checkpoint
from rotexport.errors import RecipeError
from rotexport.export import export
from rotexport.passes.quantize_weights import quantizer_of
from rotexport.pipeline import plan_sites
from rotexport.quant.scheme import ClipSearch
from rotexport.recipe import from_mapping

LENGTH = 16
WINDOWS = np.random.default_rng(0).integers(3, 90, (3, LENGTH))
CANDIDATES = [1.0, 0.9, 0.8, 0.7]
RECIPE = {
    "dtype": "fp32",
    "weights": {"format": "int4", "method": "rtn"},
    "activations": {"format": "int4", "mode": "dynamic", "clip": 0.95},
    "clip_search": {"candidates": 4, "lowest": 0.7, "windows": 3},
}


def quiet(done: int, of: int) -> None:
    pass


@pytest.fixture(scope="module")
def network() -> Network:
    recipe = from_mapping(RECIPE)
    graph = export(open_checkpoint(tiny_model("llama", initializer_range=0.3)))
    return Network(graph, plan_sites(graph, recipe), {}, recipe)


def rounded(x: np.ndarray, clip: float) -> np.ndarray:
    scale = np.abs(x).max(-1, keepdims=True) * clip / 7
    return np.clip(np.rint(x / scale), -7, 7) * scale


def first_input(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Return what queries, keys and values of the first block read, and their weights side by side."""
    split = split_blocks(network.graph)
    block = TorchBlock(split.blocks[0])
    x = torch.cat([split.embed(window) for window in WINDOWS])
    name = block.input_of["0.query"]
    with torch.no_grad():
        seen = block.run(block.begin(x, split.context(LENGTH)), [name])[name]
    weight = torch.cat([block.weights[f"0.{role}"] for role in ("query", "key", "value")], 1)
    return seen.double().numpy(), weight.double().numpy()


def test_the_clip_of_least_error_is_chosen(network: Network) -> None:
    plan, choices = search_clips(network, {}, WINDOWS, quiet)
    x, weight = first_input(network)
    exact = x @ weight

    def error(clip: float) -> float:
        wrong = ((rounded(x, clip) @ weight - exact) ** 2).sum(-1)
        return float((wrong / (exact**2).sum(-1)).mean())

    errors = {clip: error(clip) for clip in [*CANDIDATES, 0.95]}
    best = min(errors, key=errors.get)
    first = choices[0]
    assert first.sites == ("0.query", "0.key", "0.value")
    assert first.clip == pytest.approx(best)
    assert first.after == pytest.approx(errors[best], rel=1e-3)
    assert first.before == pytest.approx(errors[0.95], rel=1e-3)
    clips = {site.site: site.activations.clip for site in plan}
    assert [clips[site] for site in first.sites] == [first.clip] * 3
    assert {site for choice in choices for site in choice.sites} == {
        linear.name for block in split_blocks(network.graph).blocks for linear in block.sites
    }
    assert all(choice.after <= choice.before for choice in choices)


def test_behind_quantized_weights_the_quantized_networks_products_count(network: Network) -> None:
    solved = {site.site: quantizer_of(site) for site in network.plan if site.site != "head"}
    _, before = search_clips(network, {}, WINDOWS, quiet)
    _, choices = search_clips(network, solved, WINDOWS, quiet)
    assert all(choice.after <= choice.before for choice in choices)
    # Rounded weights, and what the products before did to the inputs, add to the error.
    assert all(after.after > choice.after for choice, after in zip(before, choices, strict=True))
    x, weight = first_input(network)
    exact, quantized = x @ weight, rounded_columns(weight)
    wrong = ((rounded(x, choices[0].clip) @ quantized - exact) ** 2).sum(-1)
    assert choices[0].after == pytest.approx(float((wrong / (exact**2).sum(-1)).mean()), rel=1e-2)


def rounded_columns(weight: np.ndarray) -> np.ndarray:
    """Round to 4 bits with the scale of the largest magnitude of each column."""
    scale = np.abs(weight).max(axis=0) / 7
    return np.clip(np.rint(weight / scale), -8, 7) * scale


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"candidates": -1}, r"clip_search\.candidates: -1"),
        ({"windows": 0}, r"clip_search\.windows: 0"),
        ({"lowest": 0}, r"clip_search\.lowest: 0 is not above 0"),
    ],
)
def test_impossible_searches_are_refused(fields, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ClipSearch(**fields)


def test_a_search_without_quantized_activations_is_refused() -> None:
    with pytest.raises(RecipeError, match="clip_search tries clips of quantized activations"):
        from_mapping({**RECIPE, "activations": {}})


def test_by_default_nothing_is_searched() -> None:
    assert not from_mapping({}).clip_search.enabled
