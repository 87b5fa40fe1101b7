"""Quantized blocks and networks learn, on a tiny model, and what they export is what they computed."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from support.tiny import tiny_model

from rotexport.blocks.split import Split, split_blocks
from rotexport.blocks.torch_block import Edits, TorchBlock
from rotexport.checkpoint import open_checkpoint
from rotexport.errors import RecipeError
from rotexport.export import export
from rotexport.learning.distill import Distillation, Network, distill, divergence
from rotexport.learning.reconstruct import (
    Examples,
    Reconstruction,
    batches,
    rate_schedule,
    reconstruct,
    relative_error,
)
from rotexport.learning.student import Rates, Student, make_student
from rotexport.passes.quantize_weights import quantizer_of
from rotexport.pipeline import plan_sites
from rotexport.quant.plan import SitePlan
from rotexport.quant.solved import dequantized
from rotexport.recipe import from_mapping

LENGTH = 24
WINDOWS = np.random.default_rng(0).integers(3, 90, (8, LENGTH))
RATES = Rates(weights=0.03, scales=0.01, clips=0.02)


@cache
def decoder() -> Split:
    return split_blocks(export(open_checkpoint(tiny_model("llama", initializer_range=0.3))))


def plan_of(**activations: object) -> dict[str, SitePlan]:
    recipe = from_mapping(
        {
            "weights": {"format": "int4", "group": 16},
            "activations": {"format": "int8", "mode": "dynamic", **activations},
        }
    )
    return {site.site: site for site in plan_sites(decoder().graph, recipe)}


def student_of(block: TorchBlock, plan: dict[str, SitePlan]) -> Student:
    starts = {
        name: quantizer_of(plan[name]).quantize(weight.numpy()) for name, weight in block.weights.items()
    }
    return make_student(block, plan, starts, {}, torch.float16)


def outputs(student: Student, x: torch.Tensor, edits: Edits) -> torch.Tensor:
    with torch.no_grad():
        return student.block(x, decoder().context(LENGTH), edits)


def test_reconstruction_brings_a_block_nearer_to_the_float_block() -> None:
    split = decoder()
    block = TorchBlock(split.blocks[0])
    inputs = torch.cat([split.embed(window) for window in WINDOWS])
    targets = block(inputs, split.context(LENGTH)).detach()
    student = student_of(block, plan_of())
    before = relative_error(outputs(student, inputs, student.edits), targets).item()
    examples = Examples(list(inputs), list(targets), split.context(LENGTH))
    calls = []
    losses = reconstruct(
        student, examples, Reconstruction(60, batch=4, rates=RATES), lambda *done: calls.append(done)
    )
    after = relative_error(outputs(student, inputs, student.edits), targets).item()
    assert after < 0.85 * before
    assert len(losses) == 60 and calls[-1] == (60, 60)


def test_exported_tensors_give_the_trained_block_bit_for_bit() -> None:
    split = decoder()
    block = TorchBlock(split.blocks[0])
    inputs = torch.cat([split.embed(window) for window in WINDOWS])
    student = student_of(block, plan_of())
    targets = list(block(inputs, split.context(LENGTH)).detach())
    reconstruct(
        student, Examples(list(inputs), targets, split.context(LENGTH)), Reconstruction(5, rates=RATES)
    )
    trained = outputs(student, inputs, student.edits)
    stored = student.tensors()
    for site, tensor in stored.items():
        block.weights[site] = torch.from_numpy(dequantized(tensor))
    exported = outputs(student, inputs, Edits(inputs=student.inputs))
    np.testing.assert_array_equal(exported, trained)


def test_distillation_lowers_the_divergence_of_text_it_did_not_see() -> None:
    split = decoder()
    blocks = [TorchBlock(block) for block in split.blocks]
    network = Network(split, blocks, split.context(LENGTH))
    students = [student_of(block, plan_of(format="int4", clip=0.9)) for block in blocks]

    def unseen() -> float:
        with torch.no_grad():
            edits = [student.edits for student in students]
            return divergence(network.logits(WINDOWS[:2]), network.logits(WINDOWS[:2], edits)).item()

    before = unseen()
    losses = distill(network, students, list(WINDOWS[2:]), Distillation(40, batch=2, rates=RATES))
    assert unseen() < 0.8 * before
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_learned_clips_go_into_the_plan() -> None:
    student = student_of(TorchBlock(decoder().blocks[0]), plan_of(clip=0.5))
    assert student.inputs["0.query"] is student.inputs["0.value"]
    with torch.no_grad():
        student.inputs["0.query"].logit.fill_(0.0)
        student.inputs["0.down"].logit.fill_(20.0)
    planned = {name: student.planned(site).activations.clip for name, site in plan_of(clip=0.5).items()}
    assert planned["0.value"] == 0.5 and planned["0.down"] == pytest.approx(1)
    assert planned["1.query"] == 0.5  # another block's


def test_scales_alone_leave_the_codes() -> None:
    split = decoder()
    block = TorchBlock(split.blocks[0])
    student = student_of(block, plan_of())
    inputs = torch.cat([split.embed(window) for window in WINDOWS])
    targets = list(block(inputs, split.context(LENGTH)).detach())
    numbers = {site: weight.numbers.detach().clone() for site, weight in student.weights.items()}
    settings = Reconstruction(5, rates=Rates(weights=0, scales=0.001, clips=0))
    reconstruct(student, Examples(list(inputs), targets, split.context(LENGTH)), settings)
    for site, weight in student.weights.items():
        assert (weight.numbers - numbers[site]).abs().max() < 0.1  # the range's ends move with the scale


def test_static_activations_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"0\.query.*dynamic activations only"):
        student_of(TorchBlock(decoder().blocks[0]), plan_of(mode="static"))


def test_every_window_is_seen_before_any_is_seen_again() -> None:
    drawn = [index for batch in batches(8, Reconstruction(6, batch=4)) for index in batch]
    assert sorted(drawn[:8]) == sorted(drawn[8:16]) == list(range(8))
    assert drawn[:8] != drawn[8:16]


def test_rates_warm_up_and_end_small() -> None:
    factor = rate_schedule(100)
    assert factor(0) == pytest.approx(0.2) and factor(5) > 0.98 and factor(100) == pytest.approx(0.05)
