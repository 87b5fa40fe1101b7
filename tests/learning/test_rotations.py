"""Rotations are learned: the float network stays, the quantized one improves, files keep what was learned."""

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
from rotexport.errors import RecipeError, TransformError
from rotexport.export import export
from rotexport.learning.rotations import Rotations, rotate
from rotexport.learning.spin import Problem, learn_rotations, learned_matrices
from rotexport.learning.training import RotationTraining
from rotexport.pipeline import Pipeline, learned_passes, plan_sites, rotation_passes
from rotexport.recipe import from_mapping
from rotexport.runtime.model import OnnxModel
from rotexport.transforms.rotation_file import read_rotation, write_rotations
from rotexport.transforms.transform import OrthogonalMatrix

LENGTH = 16
WINDOWS = np.random.default_rng(0).integers(3, 90, (6, LENGTH))
TRAINING = {"steps": 24, "batch": 3, "rate": 0.3, "windows": 6}
RECIPE = {
    "dtype": "fp32",
    "rotations": {"r1": "learned", "r2": "learned", "r4": "hadamard"},
    "weights": {"format": "int4", "group": 16},
    "activations": {"format": "int4", "mode": "dynamic"},
    "learn_rotations": TRAINING,
    "calibration_windows": 6,
}


def problem_of(model_type: str = "llama") -> Problem:
    recipe = from_mapping(RECIPE)
    graph = export(open_checkpoint(tiny_model(model_type, initializer_range=0.3)))
    plan = plan_sites(graph, recipe)
    Pipeline(graph, None).run(rotation_passes(recipe.rotations), lambda name: None)
    network, split = Network(graph, plan, {}, recipe), split_blocks(graph)
    return Problem(network, split, list(WINDOWS), Rotations(network, True, True), split.context(LENGTH))


def turned(problem: Problem) -> Problem:
    """Put random rotations where training starts from the identity."""
    for seed, parameter in enumerate(problem.rotations.parameters()):
        parameter.data.copy_(torch.tensor(OrthogonalMatrix.random(len(parameter), seed).values))
    return problem


def test_rotate_acts_on_row_vectors_block_by_block() -> None:
    values, rotation = torch.randn(3, 8, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    twice = torch.block_diag(rotation, rotation)
    torch.testing.assert_close(rotate(values, 1, rotation), values @ twice)
    torch.testing.assert_close(rotate(values.T, 0, rotation), (values @ twice).T)


@pytest.mark.parametrize("model_type", ["llama", "opt", "qwen2"])  # opt and qwen2 have biases
def test_any_rotation_leaves_the_float_block_as_it_is(model_type: str) -> None:
    problem = turned(problem_of(model_type))
    x = problem.split.embed(WINDOWS[0])
    for graph in problem.split.blocks:
        block = TorchBlock(graph)
        expected = block(x, problem.context)
        edits = Edits(weights=problem.rotations.weight_edits(graph, {}))
        given = {
            **block.begin(problem.rotations.into(x), problem.context),
            **problem.rotations.constants(block),
        }
        result = problem.rotations.out_of(block.run(given, [graph.output], edits)[graph.output])
        torch.testing.assert_close(result, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
        x = expected.detach()


def test_folding_what_was_learned_gives_the_graph_that_was_trained(tmp_path: Path) -> None:
    problem = turned(problem_of())
    x = problem.split.embed(WINDOWS[0])
    rotated = problem.rotations.into(x).detach()
    first = TorchBlock(problem.split.blocks[0])
    expected = problem.rotations.into(first(x, problem.context)).detach()
    graph = problem.network.graph
    Pipeline(graph, None).run(learned_passes(learned_matrices(problem.rotations)), lambda name: None)
    split = split_blocks(graph)
    torch.testing.assert_close(split.embed(WINDOWS[0]), rotated, atol=1e-5, rtol=0)
    folded = TorchBlock(split.blocks[0])(rotated, split.context(LENGTH))
    torch.testing.assert_close(folded, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("loss", ["block", "network"])
def test_training_lowers_the_quantized_networks_loss(loss: str, tmp_path: Path) -> None:
    problem = problem_of()
    losses = learn_rotations(problem, RotationTraining(**TRAINING, loss=loss), tmp_path)
    assert np.mean(losses[-6:]) < np.mean(losses[:6])
    for matrix in learned_matrices(problem.rotations).values():
        dense = matrix.dense()
        assert np.abs(dense @ dense.T - np.eye(len(dense))).max() < 1e-12
        assert np.abs(dense - np.eye(len(dense))).max() > 1e-3  # it moved


@pytest.mark.parametrize("loss", ["block", "network"])
def test_an_interrupted_run_goes_on_where_it_saved(loss: str, tmp_path: Path) -> None:
    training = RotationTraining(**{**TRAINING, "steps": 10}, loss=loss)
    whole = problem_of()
    losses = learn_rotations(whole, training, tmp_path / "whole")

    def stop(done: int, of: int) -> None:
        if done == 7:  # three steps past what was saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_rotations(problem_of(), training, tmp_path / "cut", stop)
    resumed, told = problem_of(), []
    again = learn_rotations(resumed, training, tmp_path / "cut", lambda done, of: told.append(done))
    assert told == [5, 6, 7, 8, 9, 10]
    assert again == losses
    for first, second in zip(whole.rotations.parameters(), resumed.rotations.parameters(), strict=True):
        assert torch.equal(first, second)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["learned.pt"]


def test_a_build_folds_learned_rotations_and_keeps_them(tmp_path: Path) -> None:
    model = tiny_model("llama", initializer_range=0.3)
    report = build(model, tmp_path / "learned", from_mapping(RECIPE), BuildOptions(validate=False))
    assert any("rotations learned for 24 steps" in note for note in report.notes)
    kept = tmp_path / "learned" / "rotations.bin"
    again = {name: {"kind": "file", "file": str(kept)} for name in ("r1", "r2")}
    fixed = {**RECIPE, "rotations": {**again, "r4": "hadamard"}, "learn_rotations": {}}
    build(model, tmp_path / "read", from_mapping(fixed), BuildOptions(validate=False))
    learned, read = (
        OnnxModel(tmp_path / name / "model.onnx").run(WINDOWS[:1])["logits"] for name in ("learned", "read")
    )
    # The same weights but for the order of two products in float64, so a code here and there.
    assert np.corrcoef(learned.ravel(), read.ravel())[0, 1] > 0.999


def test_spinquants_file_is_read_by_its_keys(tmp_path: Path) -> None:
    r1, r2 = OrthogonalMatrix.random(8, 0), OrthogonalMatrix.random(4, 1)
    path = tmp_path / "R.bin"
    torch.save(
        {"R1": torch.tensor(r1.values).float(), "model.layers.3.self_attn.R2": torch.tensor(r2.values)}, path
    )
    np.testing.assert_allclose(read_rotation(path, None, 8).values, r1.values, atol=1e-6)
    read = read_rotation(path, 3, 4).values
    np.testing.assert_allclose(read, r2.values, atol=1e-12)
    write_rotations(tmp_path / "again.bin", {3: OrthogonalMatrix(read)})
    assert list(torch.load(tmp_path / "again.bin")) == ["model.layers.3.self_attn.R2"]
    for block, size, message in ((4, 4, "has no 'model.layers.4.self_attn.R2'"), (3, 8, "4x4.*8 channels")):
        with pytest.raises(TransformError, match=message):
            read_rotation(path, block, size)
    with pytest.raises(TransformError, match="does not exist"):
        read_rotation(tmp_path / "none.bin", None, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learn_rotations": {}}, "go together"),
        ({"rotations": {"r1": "hadamard"}}, "go together"),
        ({"rotations": {"r1": "learned", "r4": "learned"}}, "cannot run online"),
        ({"rotations": {"r2": "learned", "o_heads": "hadamard"}}, "heads that are not mixed"),
        ({"rotations": {"r1": "file"}}, "needs its `file`"),
        ({"weights": {}, "activations": {}}, "set weights.format"),
        ({"learn_rotations": {"steps": 3, "loss": "mean"}}, "loss: 'mean'"),
        ({"learn_rotations": {"steps": 3, "rate": 0}}, "rate: 0"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    from_mapping(RECIPE)
    with pytest.raises(RecipeError, match=message):
        from_mapping({**RECIPE, **change})
