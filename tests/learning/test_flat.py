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
from rotexport.errors import OutputError, RecipeError
from rotexport.export import export
from rotexport.learning.flat import learn_affine
from rotexport.learning.rotations import quantizers
from rotexport.pipeline import Pipeline, affine_passes, plan_sites
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
    groups = {group for block in split.blocks for group in TorchBlock(block).groups}
    assert set(learned.flattening.inputs) == groups
    assert set(learned.flattening.values) == {0, 1} and not learned.flattening.keys
    assert learned.plan == network.plan  # no clips were learned
    assert all(after < before for before, after in learned.errors.values())
    Pipeline(graph, None).run(affine_passes(learned.flattening), lambda name: None)
    after = TorchBlock(split_blocks(graph).blocks[0])(x, context).detach()
    torch.testing.assert_close(after, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    assert block_error(network, expected) < 0.9 * before


def network_of(recipe) -> Network:
    parsed = from_mapping(recipe)
    graph = export(open_checkpoint(tiny_model("llama", initializer_range=0.3)))
    return Network(graph, plan_sites(graph, parsed), {}, parsed)


CLIPPED = {**RECIPE, "learn_affine": {**RECIPE["learn_affine"], "steps": 20, "clip_rate": 0.1}}


def test_clips_learn_together_with_the_transforms(tmp_path: Path) -> None:
    learned = learn_affine(network_of(CLIPPED), WINDOWS, tmp_path)
    for site in learned.plan:
        if site.site == "head":
            assert site.clips is None
            continue
        assert 0.5 < site.activations.clip < 1
        with np.load(site.clips) as clips:
            ratios = clips[site.site]
        assert 0 < ratios.min() < 0.97 and ratios.max() < 1  # from 0.982 on
    plain = learn_affine(
        network_of({**CLIPPED, "learn_affine": {**CLIPPED["learn_affine"], "clip_rate": 0}}),
        WINDOWS,
        tmp_path / "plain",
    )
    assert sum(after for _, after in learned.errors.values()) < sum(
        after for _, after in plain.errors.values()
    )


def test_an_interrupted_run_goes_on_with_the_next_block(tmp_path: Path) -> None:
    quick = {**CLIPPED, "learn_affine": {**CLIPPED["learn_affine"], "steps": 3}}
    whole = learn_affine(network_of(quick), WINDOWS, tmp_path / "whole")

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_affine(network_of(quick), WINDOWS, tmp_path / "cut", stop)
    kept = (tmp_path / "cut" / "block-0.pt").stat().st_mtime_ns
    resumed = learn_affine(network_of(quick), WINDOWS, tmp_path / "cut")
    assert (tmp_path / "cut" / "block-0.pt").stat().st_mtime_ns == kept
    assert resumed.flattening == whole.flattening
    assert resumed.errors == whole.errors
    for index in (0, 1):
        with (
            np.load(tmp_path / "whole" / f"clips-{index}.npz") as first,
            np.load(tmp_path / "cut" / f"clips-{index}.npz") as second,
        ):
            assert set(first) == set(second)
            assert all(np.array_equal(first[site], second[site]) for site in first)
    assert not list((tmp_path / "cut").glob("*.stream"))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    quick = {**RECIPE, "learn_affine": {**RECIPE["learn_affine"], "steps": 1}}
    learn_affine(network_of(quick), WINDOWS, tmp_path)
    with pytest.raises(OutputError, match="another model, recipe or text"):
        learn_affine(network_of(RECIPE), WINDOWS, tmp_path)


def test_a_build_with_learned_transforms_runs(tmp_path: Path) -> None:
    quick = {
        **RECIPE,
        "kv_cache": {"key": "int4", "value": "int4"},
        "learn_affine": {**RECIPE["learn_affine"], "steps": 2, "clip_rate": 0.05},
    }
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
        ({"learn_affine": {"steps": 1, "clip_rate": -1}}, "clip_rate: -1"),
        ({"learn_affine": {"steps": 1, "clip_rate": "fast"}}, "clip_rate: 'fast'"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        from_mapping({**RECIPE, **change})
