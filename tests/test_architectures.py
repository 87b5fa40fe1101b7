"""Rotated graphs of real architectures compute what PyTorch computes, and say what could not be rotated."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.tiny import tiny_model

from rotexport.checkpoint import open_checkpoint
from rotexport.export import export
from rotexport.graph.io import Scratch, save_model
from rotexport.metrics import Thresholds
from rotexport.passes.base import Placement, Where
from rotexport.pipeline import Pipeline, rotation_passes
from rotexport.recipe import Rotation, Rotations
from rotexport.reference import reference_model
from rotexport.texts import random_windows
from rotexport.validate import PassValidator, Proof, observe_reference, prove

ALL = Rotations(
    r1=Rotation("random-hadamard", seed=5),
    r2=Rotation("random-hadamard", seed=6),
    r3=Rotation("hadamard"),
    r4=Rotation("hadamard"),
    o_heads=Rotation("hadamard"),
)
FOLDED, ONLINE = Where.FOLDED, Where.ONLINE
# Where each rotation must end up, by model type.
EXPECTED = {
    "llama": {"r1": FOLDED, "r2": FOLDED, "r3": ONLINE, "r4": ONLINE, "o_heads": ONLINE},
    "mistral": {"r1": FOLDED, "r2": FOLDED, "r3": ONLINE, "r4": ONLINE, "o_heads": ONLINE},
    "qwen2": {"r1": FOLDED, "r2": FOLDED, "r3": ONLINE, "r4": ONLINE, "o_heads": ONLINE},
    "qwen3": {"r1": FOLDED, "r2": FOLDED, "r3": ONLINE, "r4": ONLINE, "o_heads": ONLINE},
    "gemma3_text": {"r1": ONLINE, "r2": FOLDED, "r3": ONLINE, "r4": ONLINE, "o_heads": ONLINE},
    "opt": {"r1": FOLDED, "r2": FOLDED, "r3": FOLDED, "r4": ONLINE, "o_heads": ONLINE},
}


@pytest.fixture(params=EXPECTED)
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    with tempfile.TemporaryDirectory() as folder:
        yield Scratch(Path(folder))


def rotated(model_type: str, rotations: Rotations, scratch: Scratch) -> tuple[Proof, list[Placement]]:
    checkpoint = open_checkpoint(tiny_model(model_type))
    tokens = random_windows(checkpoint.config.vocab_size, 24, 1)[0]
    reference = observe_reference(reference_model(checkpoint), tokens)
    pipeline = Pipeline(export(checkpoint), PassValidator(scratch, tokens))
    pipeline.run(rotation_passes(rotations), lambda name: None)
    path = scratch.directory / "model.onnx"
    save_model(pipeline.graph, path, scratch)
    return prove(reference, path, Thresholds(), pipeline.stream_view()), pipeline.placements


def test_all_rotations_together_leave_the_model_as_it_is(model_type: str, scratch: Scratch) -> None:
    proof, placements = rotated(model_type, ALL, scratch)
    assert proof.comparison.relative_error < 2e-4
    assert proof.comparison.top1_agreement == 1
    assert proof.cached is not None
    assert proof.cached.relative_error < 2e-4
    assert {p.rotation: p.where for p in placements} == EXPECTED[model_type]


def test_block_outputs_equal_pytorchs_once_the_rotation_is_undone(model_type: str, scratch: Scratch) -> None:
    proof, _ = rotated(model_type, Rotations(r1=Rotation("random-hadamard", seed=5)), scratch)
    assert proof.blocks
    assert all(block.sqnr_db > 80 for block in proof.blocks)


def test_a_dense_random_rotation_folds_as_well(scratch: Scratch) -> None:
    dense = Rotations(r1=Rotation("orthogonal", seed=1), r2=Rotation("orthogonal", seed=2))
    proof, placements = rotated("llama", dense, scratch)
    assert proof.comparison.relative_error < 2e-4
    assert {p.where for p in placements} == {FOLDED}


def test_every_block_of_a_rotation_is_reported(scratch: Scratch) -> None:
    _, placements = rotated("qwen2", ALL, scratch)
    blocks = {p.site for p in placements if p.rotation == "r4"}
    assert blocks == {"0.down", "1.down"}
    assert np.unique([p.rotation for p in placements]).tolist() == ["o_heads", "r1", "r2", "r3", "r4"]
