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

from rotexport.blocks.calibration import BlockResult, Network, solve_blocks
from rotexport.blocks.gptq_blocks import GptqMethod
from rotexport.blocks.split import Split, split_blocks
from rotexport.blocks.torch_block import TorchBlock
from rotexport.checkpoint import open_checkpoint
from rotexport.errors import RecipeError
from rotexport.export import export
from rotexport.learning.distill import Teacher, distill, divergence
from rotexport.learning.network import distill_network
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


def recipe_of(distill: Mapping[str, object] | None = None, **activations: object) -> Recipe:
    return from_mapping(
        {
            "distill": distill or {},
            "weights": {"format": "int4", "group": 16, "method": "gptq"},
            "activations": {"format": "int8", "mode": "dynamic", **activations},
            "kv_cache": {"key": "int8"},
        }
    )


def network_of(distill: Mapping[str, object] | None = None, **activations: object) -> Network:
    graph, recipe = decoder().graph, recipe_of(distill, **activations)
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


def error_of(results: list[BlockResult]) -> float:
    return results[-1].error


def test_reconstruction_beats_gptq_on_the_float_blocks_outputs(tmp_path: Path) -> None:
    method = GptqMethod(GptqSettings())
    training = Training(40, batch=4, **FAST)
    _, gptq = solve_blocks(network_of(), method, WINDOWS, tmp_path / "gptq", lambda *_: None)
    learner = ReconstructMethod(method, training, torch.float16)
    solved, learned = solve_blocks(network_of(), learner, WINDOWS, tmp_path / "learned", lambda *_: None)
    assert error_of(learned) < 0.9 * error_of(gptq)
    assert learned[0].sites["0.down"]["last"] < learned[0].sites["0.down"]["first"]
    assert solved["1.down"].quantize(np.empty((64, 32), np.float32)).codes.shape == (64, 32)


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


def test_distillation_lowers_the_divergence_of_text_it_did_not_see(tmp_path: Path) -> None:
    training = {"steps": 30, "batch": 2, "clip_rate": 0.02, **FAST}
    network, split = network_of(training, format="int4", clip=0.9), decoder()
    starts = {site.site: quantizer_of(site) for site in network.plan}
    teacher = Teacher(split, [TorchBlock(block) for block in split.blocks], split.context(LENGTH))
    result = distill_network(network, starts, WINDOWS[2:], tmp_path)
    after = divergence_of(teacher, replace(network, plan=result.plan), result.solved)
    assert after < 0.8 * divergence_of(teacher, network, starts)
    clips = {site.site: site.activations.clip for site in result.plan}
    assert clips["0.query"] == clips["0.value"] != clips["0.down"] != 0.9


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


def test_static_activations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"0\.query.*dynamic activations only"):
        distill_network(network_of({"steps": 1}, mode="static"), {}, WINDOWS, tmp_path)


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
