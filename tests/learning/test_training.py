"""Quantized blocks and networks learn, on a tiny model, and what they export is what they computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import tiny_model

from rotexport.blocks.calibration import BlockMethod, BlockResult, Network, solve_blocks
from rotexport.blocks.gptq_blocks import GptqMethod
from rotexport.blocks.split import Split, split_blocks
from rotexport.blocks.torch_block import TorchBlock
from rotexport.checkpoint import open_checkpoint
from rotexport.errors import RecipeError
from rotexport.export import export
from rotexport.learning.distill import Teacher, distill, divergence
from rotexport.learning.network import check_learnable, distill_network
from rotexport.learning.reconstruct import ReconstructMethod
from rotexport.learning.student import Student, StudentSettings, make_student
from rotexport.learning.training import Training
from rotexport.passes.quantize_weights import quantizer_of
from rotexport.pipeline import plan_sites
from rotexport.quant.gptq import GptqSettings
from rotexport.quant.scales import WeightQuantizer
from rotexport.quant.solved import dequantized
from rotexport.recipe import Recipe, from_mapping

LENGTH = 24
WINDOWS = np.random.default_rng(0).integers(3, 90, (8, LENGTH))
FAST = {"weight_rate": 0.03, "scale_rate": 0.01}


@cache
def decoder() -> Split:
    return split_blocks(export(open_checkpoint(tiny_model("llama", initializer_range=0.3))))


def recipe_of(
    distill: Mapping[str, object] | None = None, method: str = "gptq", **activations: object
) -> Recipe:
    return from_mapping(
        {
            "distill": distill or {},
            "weights": {"format": "int4", "group": 16, "method": method},
            "activations": {"format": "int8", "mode": "dynamic", **activations},
            "kv_cache": {"key": "int8"},
        }
    )


def network_of(
    distill: Mapping[str, object] | None = None, method: str = "gptq", **activations: object
) -> Network:
    graph, recipe = decoder().graph, recipe_of(distill, method, **activations)
    return Network(graph, plan_sites(graph, recipe), {}, recipe)


def students_of(network: Network, learn_clips: bool = False) -> list[Student]:
    plan = {site.site: site for site in network.plan}
    made = []
    for graph in decoder().blocks:
        block = TorchBlock(graph)
        starts = {name: quantizer_of(plan[name]).quantize(w.numpy()) for name, w in block.weights.items()}
        settings = StudentSettings(torch.float16, learn_clips)
        made.append(make_student(block, plan, network.edits(graph).attention, starts, settings))
    return made


def solve(network: Network, method: BlockMethod, folder: Path) -> list[BlockResult]:
    return solve_blocks(network, method, WINDOWS, folder, lambda *_: None).results


def test_reconstruction_brings_rounded_blocks_nearer_to_float_ones(tmp_path: Path) -> None:
    network = network_of(method="search")
    rounding = GptqMethod(GptqSettings())
    learner = ReconstructMethod(rounding, Training(40, batch=4, **FAST), torch.float16)
    rounded = solve(network, rounding, tmp_path / "rounded")
    learned = solve(network, learner, tmp_path / "learned")
    assert learned[-1].error < 0.9 * rounded[-1].error
    figures = learned[0].sites["0.down"]
    assert figures["block learned"] < 0.9 * figures["block before learning"]


def test_training_that_makes_a_block_worse_is_dropped(tmp_path: Path) -> None:
    network, gptq = network_of(), GptqMethod(GptqSettings())
    wild = Training(10, weight_rate=0.9, scale_rate=0.5)
    kept = solve(network, ReconstructMethod(gptq, wild, torch.float16), tmp_path / "wild")
    figures = kept[0].sites["0.down"]
    assert figures["block learned"] > figures["block before learning"]
    assert kept[0].error == solve(network, gptq, tmp_path / "gptq")[0].error


def test_exported_tensors_give_the_trained_block_bit_for_bit() -> None:
    network, split = network_of(format="int4", clip=0.9), decoder()
    students = students_of(network)
    teacher = Teacher(split, [student.block for student in students], split.context(LENGTH))
    list(distill(teacher, students, list(WINDOWS), Training(5, **FAST)))
    for student in students:
        x = torch.cat([split.embed(window) for window in WINDOWS])
        with torch.no_grad():
            trained = student.block(x, teacher.context, student.edits)
            for site, tensor in student.tensors().items():
                student.block.weights[site] = torch.from_numpy(dequantized(tensor))
            exported = student.block(x, teacher.context, network.edits(student.block.block))
        np.testing.assert_array_equal(exported, trained)


def divergence_of(teacher: Teacher, network: Network, solved: Mapping[str, WeightQuantizer]) -> float:
    """Of the two windows that nothing was trained on."""
    edits = []
    for block in teacher.blocks:
        codes = {
            name: solved[name].quantize(w.numpy()) for name, w in block.weights.items() if name in solved
        }
        weights = {name: torch.from_numpy(dequantized(tensor)) for name, tensor in codes.items()}
        edits.append(
            replace(network.edits(block.block), weights={n: lambda _, w=w: w for n, w in weights.items()})
        )
    with torch.no_grad():
        return divergence(teacher.logits(WINDOWS[:2]), teacher.logits(WINDOWS[:2], edits)).item()


def test_distillation_lowers_the_divergence_also_of_text_it_did_not_see(tmp_path: Path) -> None:
    training = {"steps": 60, "batch": 8, "weight_rate": 0.03, "scale_rate": 0.005, "clip_rate": 0.02}
    network, split = network_of(training, format="int4", clip=0.9), decoder()
    starts = {site.site: quantizer_of(site) for site in network.plan if site.weights.enabled}
    teacher = Teacher(split, [TorchBlock(block) for block in split.blocks], split.context(LENGTH))
    seen = np.random.default_rng(1).integers(3, 90, (96, LENGTH))
    result = distill_network(network, starts, seen, tmp_path)
    assert np.mean(result.losses[-5:]) < 0.8 * np.mean(result.losses[:5])
    after = divergence_of(teacher, replace(network, plan=result.plan), result.solved)
    assert after < 0.95 * divergence_of(teacher, network, starts)
    clips = {site.site: site.activations.clip for site in result.plan}
    assert clips["0.query"] == clips["0.value"] != clips["0.down"] != 0.9
    assert "distilled for 60 steps" in result.note


def test_an_interrupted_distillation_goes_on_where_it_saved(tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop_at_7(done: int, of: int) -> None:
        if done == 7:
            raise StoppedError

    seen: list[int] = []
    network = network_of({"steps": 10, **FAST})
    with pytest.raises(StoppedError):
        distill_network(network, {}, WINDOWS, tmp_path, stop_at_7)
    result = distill_network(network, {}, WINDOWS, tmp_path, lambda done, of: seen.append(done))
    assert seen == [8, 9, 10] and len(result.losses) == 10


def test_recomputed_blocks_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr("rotexport.learning.distill.RESIDENT_BYTES", limit)
        students = students_of(network_of())
        teacher = Teacher(decoder(), [s.block for s in students], decoder().context(LENGTH))
        target = teacher.logits(WINDOWS[:1]).detach()
        divergence(target, teacher.logits(WINDOWS[:1], [s.edits for s in students])).backward()
        gradients.append(students[0].weights["0.down"].numbers.grad)
    assert torch.equal(*gradients)


def test_scales_alone_leave_the_numbers() -> None:
    students = students_of(network_of())
    before = {site: weight.numbers.detach().clone() for site, weight in students[0].weights.items()}
    teacher = Teacher(decoder(), [s.block for s in students], decoder().context(LENGTH))
    list(distill(teacher, students, list(WINDOWS), Training(3, weight_rate=0, scale_rate=0.001)))
    for site, weight in students[0].weights.items():
        assert weight.channel.abs().max() > 0
        assert (weight.numbers - before[site]).abs().max() < 0.1  # the range's ends move with the scale


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activations": {"mode": "static"}}, r"0\.query: .* dynamic activations only"),
        (
            {"activations": {"format": "fp8"}, "weights": {"format": "fp8", "group": None}},
            "int8 and int4, not fp8",
        ),
        ({"activations": {"format": "none"}, "weights": {"format": "none"}}, "set weights.format"),
    ],
)
def test_what_cannot_be_learned_is_refused(change: dict[str, dict[str, object]], message: str) -> None:
    recipe = recipe_of()
    recipe = replace(
        recipe,
        weights=replace(recipe.weights, **change.get("weights", {})),
        activations=replace(recipe.activations, **change["activations"]),
    )
    with pytest.raises(RecipeError, match=message):
        check_learnable(plan_sites(decoder().graph, recipe))
    check_learnable(plan_sites(decoder().graph, recipe_of()))


def test_every_window_is_seen_before_any_is_seen_again() -> None:
    drawn = [index for batch in Training(6, batch=4).batches(8) for index in batch]
    assert sorted(drawn[:8]) == sorted(drawn[8:16]) == list(range(8))
    assert drawn[:8] != drawn[8:16]


def test_rates_warm_up_and_end_small() -> None:
    training = Training(100)
    assert training.rate(0) == pytest.approx(0.2)
    assert training.rate(5) > 0.98
    assert training.rate(100) == pytest.approx(0.05)


@pytest.mark.parametrize(
    "wrong", [{"steps": -1}, {"steps": 1.5}, {"batch": 0}, {"weight_rate": 1}, {"seed": "x"}]
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        Training(**wrong)


def test_training_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="all rates are 0"):
        Training(10, weight_rate=0, scale_rate=0)
