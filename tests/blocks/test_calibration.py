"""Weights chosen block by block: what is exported is what was chosen, and a run goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import tiny_model

from rotexport.blocks.calibration import Network, quantized_weights, run_blocks, solve_blocks
from rotexport.blocks.gptq_blocks import GptqMethod, Moments, best_real, importance_of
from rotexport.blocks.split import split_blocks
from rotexport.blocks.torch_block import TorchBlock
from rotexport.checkpoint import open_checkpoint
from rotexport.errors import OutputError
from rotexport.export import export
from rotexport.graph.io import Scratch, save_model
from rotexport.graph.weights import weight_of
from rotexport.pipeline import Calibrated, Pipeline, plan_sites, quantization_passes, rotation_passes
from rotexport.quant.gptq import damped
from rotexport.quant.scheme import GptqSettings
from rotexport.quant.solved import dequantized
from rotexport.recipe import from_mapping
from rotexport.runtime.model import OnnxModel

SIZES = {"hidden_size": 64, "intermediate_size": 128}
WINDOWS = np.random.default_rng(0).integers(3, 90, (6, 40))
ROTATIONS = {"r1": "random-hadamard", "r2": "hadamard", "r4": "hadamard"}
W4A8 = {
    "dtype": "fp32",
    "rotations": ROTATIONS,
    "weights": {"format": "int4", "group": 32, "method": "gptq"},
    "activations": {"format": "int8", "mode": "dynamic"},
    "kv_cache": {"key": "int4", "value": "int4"},
}
SCHEMES = {
    "two-level": W4A8,
    "grouped": W4A8 | {"activations": {"format": "int4", "mode": "dynamic", "group": 32}},
    "asymmetric activations": W4A8
    | {"activations": {"format": "int4", "mode": "dynamic", "group": 32, "symmetric": False}},
    "per channel": W4A8 | {"weights": {"format": "int4", "method": "gptq"}},
    "weights alone": {"dtype": "fp32", "weights": {"format": "int4", "group": 32, "method": "gptq"}},
    "asymmetric": W4A8 | {"weights": {"format": "int4", "group": 32, "method": "gptq", "symmetric": False}},
}


def network_of(mapping, model_type: str = "llama") -> Network:
    recipe = from_mapping(mapping)
    graph = export(open_checkpoint(tiny_model(model_type, **SIZES)))
    plan = plan_sites(graph, recipe)
    Pipeline(graph, None).run(rotation_passes(recipe.rotations), announce=lambda name: None)
    return Network(graph, plan, {}, recipe)


GPTQ = GptqMethod(GptqSettings())


def run(network: Network, folder: Path, method=GPTQ, advance=lambda done, of: None):
    return solve_blocks(network, method, WINDOWS, folder, advance)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_exported_graph_holds_what_was_chosen_and_computes_what_was_calibrated(
    name: str, tmp_path: Path
) -> None:
    network = network_of(SCHEMES[name])
    solved = run(network, tmp_path / "blocks").weights
    split = split_blocks(network.graph)
    context, expected = split.context(40), split.embed(WINDOWS[0])
    chosen = {site: solved[site].quantize(np.empty(shape_of(network, site))) for site in solved}
    with torch.no_grad():
        for part in split.blocks:
            block = TorchBlock(part)
            block.weights = {site: torch.from_numpy(dequantized(chosen[site])) for site in block.weights}
            expected = block(expected, context, network.edits(part))
    passes = quantization_passes(network.recipe, network.plan, Calibrated(solved=solved))
    pipeline = Pipeline(network.graph, None)
    pipeline.run(passes, announce=lambda name: None)
    assert {site: codes_of(network.graph, site) for site in chosen} == {
        site: tensor.codes.astype(np.int8).tobytes() for site, tensor in chosen.items()
    }
    save_model(network.graph, tmp_path / "model.onnx", Scratch(tmp_path))
    last = split.blocks[-1].output
    result = OnnxModel(tmp_path / "model.onnx", extra_outputs=[last]).run(WINDOWS[:1], outputs=[last])[last]
    # Sums in another order put a few activations on the other side of a rounding tie: a step of one in 127
    # (or 15 levels of the cache) now and then.
    assert np.abs(result - expected.numpy()).mean() < 2e-3 * np.abs(result).mean()


def shape_of(network: Network, site: str) -> tuple[int, ...]:
    return next(
        tuple(linear.weight.shape)
        for part in split_blocks(network.graph).blocks
        for linear in part.sites
        if linear.name == site
    )


def codes_of(graph, site: str) -> bytes:
    name = f"{site}.weight.codes"
    return weight_of(graph.tensors()[name]).read().astype(np.int8).tobytes()


def test_feedback_follows_the_float_network_more_closely(tmp_path: Path) -> None:
    network = network_of(
        W4A8
        | {
            "activations": {"format": "int4", "mode": "dynamic"},
            "weights": {"format": "int4", "method": "gptq"},
        }
    )
    last = {}
    for feedback in (False, True):
        method = GptqMethod(GptqSettings(feedback=feedback, ridge=0))  # on the text itself
        last[feedback] = run(network, tmp_path / str(feedback), method).results[-1].error
    assert last[True] < 0.97 * last[False]


@pytest.mark.parametrize(("model_type", "nearer"), [("llama", True), ("gpt_neox", True), ("gemma2", False)])
def test_what_joins_the_stream_takes_back_its_error(model_type: str, nearer: bool, tmp_path: Path) -> None:
    network, last = network_of(W4A8, model_type), {}
    for residual in (False, True):
        method = GptqMethod(GptqSettings(residual=residual, ridge=0.01))
        last[residual] = run(network, tmp_path / str(residual), method).results[-1].error
    if nearer:
        assert last[True] < 0.97 * last[False]
    else:  # a norm follows its products, so what the stream lacks is not what they lack
        assert last[True] == last[False]


def test_a_token_with_a_massive_stream_counts_less(tmp_path: Path) -> None:
    network, massive = network_of(W4A8), 7
    table = next(node for node in network.graph.nodes if node.op == "Gather").inputs[0]
    embedding = weight_of(table).read().copy()
    embedding[massive] *= 1000  # so errors at these tokens change nothing behind the next norm
    table.values = embedding
    windows = np.where(np.arange(40) % 2, massive, WINDOWS)
    split, others = split_blocks(network.graph), windows != massive
    context, errors = split.context(40), {}
    for relative in (False, True):
        method = GptqMethod(GptqSettings(relative=relative, ridge=0))  # on the text itself
        blocks = solve_blocks(network, method, windows, tmp_path / str(relative), lambda done, of: None)
        exact = inexact = torch.cat([split.embed(window) for window in windows])
        with torch.no_grad():
            for part in split.blocks:
                block = TorchBlock(part)
                exact = block(exact, context)
                block.weights |= quantized_weights(network, blocks.weights, block)
                inexact = block(inexact, context, network.edits(part))
        errors[relative] = float((inexact - exact)[others].square().sum())
    assert errors[True] < 0.98 * errors[False]  # two of seven products have a choice


def test_a_token_that_is_massive_in_either_network_counts_less() -> None:
    usual = torch.ones(1, 3, 4)
    massive = usual * torch.tensor([1.0, 1000.0, 1.0])[:, None]
    expected = torch.tensor([[1, 0.001, 1]])
    torch.testing.assert_close(importance_of(massive, usual), expected)
    torch.testing.assert_close(importance_of(usual, massive), expected)
    assert importance_of(0 * usual, 0 * usual).isfinite().all()


def test_every_site_reports_a_falling_loss(tmp_path: Path) -> None:
    results = run(network_of(W4A8), tmp_path).results
    assert [result.block for result in results] == [0, 1]
    for result in results:
        assert set(result.sites) == {
            f"{result.block}.{role}" for role in ("query", "key", "value", "output", "gate", "up", "down")
        }
        for losses in result.sites.values():
            assert losses["rounding"] > losses["gptq"] > losses["descent"] > 0


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = run(network_of(W4A8), tmp_path / "whole")

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(network_of(W4A8), tmp_path / "cut", advance=stop)
    kept = (tmp_path / "cut" / "block-0.npz").stat().st_mtime_ns
    rest = run(network_of(W4A8), tmp_path / "cut")
    assert rest.results == whole.results
    assert (tmp_path / "cut" / "block-0.npz").stat().st_mtime_ns == kept
    network = network_of(W4A8)
    for site, quantizer in whole.weights.items():
        shape = shape_of(network, site)
        first, second = (found.quantize(np.empty(shape)) for found in (quantizer, rest.weights[site]))
        np.testing.assert_array_equal(first.codes, second.codes)
    assert whole.behind is not None and rest.behind is not None
    for first, second in (
        (whole.behind.exact, rest.behind.exact),
        (whole.behind.quantized, rest.behind.quantized),
    ):
        torch.testing.assert_close(torch.cat(list(first)), torch.cat(list(second)), rtol=0, atol=0)
    streams = list((tmp_path / "cut").glob("*.stream"))
    assert len(streams) == 2  # those alone
    streams[0].unlink()  # to save room: the weights are there, the streams are not made up
    assert run(network_of(W4A8), tmp_path / "cut").behind is None


def test_the_streams_behind_are_those_of_the_network_with_what_was_chosen(tmp_path: Path) -> None:
    network = network_of(W4A8)
    blocks = run(network, tmp_path)
    again = run_blocks(network, blocks.weights, WINDOWS)
    exact, inexact = (torch.cat(list(stream)) for stream in (again.exact, again.quantized))
    error = float((exact - inexact).abs().mean())
    assert blocks.behind is not None
    torch.testing.assert_close(torch.cat(list(blocks.behind.exact)), exact)
    # Batches sum in another order, which puts a code on the other side of a tie now and then.
    assert float((torch.cat(list(blocks.behind.quantized)) - inexact).abs().mean()) < 0.1 * error


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    run(network_of(W4A8), tmp_path)
    with pytest.raises(OutputError, match="holds a calibration of another model, recipe or text"):
        run(network_of(W4A8), tmp_path, GptqMethod(GptqSettings(sweeps=1)))


def test_the_aim_with_an_error_to_take_back_is_that_of_least_squares() -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((16, 8)).astype(np.float32)
    exact, noisy = generator.standard_normal((2, 200, 16)).astype(np.float32)
    error = (noisy @ generator.standard_normal((16, 8)) + generator.standard_normal((200, 8))).astype(
        np.float32
    )
    importance = generator.uniform(0.1, 2, 200).astype(np.float32)
    moments = Moments.of(16)
    for half in (slice(0, 80), slice(80, 200)):
        given = (torch.from_numpy(part[half]) for part in (noisy, exact, importance, error))
        moments.add(*given)
    root = np.sqrt(importance)[:, None]
    expected = np.linalg.lstsq(root * noisy, root * (exact @ weight + error), rcond=None)[0]
    np.testing.assert_allclose(best_real(weight, moments.second, moments), expected, atol=1e-4)


def test_a_ridge_keeps_what_a_few_tokens_would_lead_astray() -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((32, 8)).astype(np.float32)

    def tokens(count: int) -> tuple[np.ndarray, np.ndarray]:
        exact = generator.standard_normal((count, 32))
        return exact, exact + 0.6 * generator.standard_normal(exact.shape)

    exact, noisy = tokens(64)
    moments = Moments(noisy.T @ noisy, noisy.T @ exact)
    other_exact, other_noisy = tokens(4096)

    def error(aim: np.ndarray) -> float:
        return float(np.square(other_noisy @ aim - other_exact @ weight).mean())

    free = best_real(weight, moments.second, moments)
    np.testing.assert_allclose(free, np.linalg.lstsq(noisy, exact @ weight, rcond=None)[0], atol=1e-5)
    ridged = best_real(weight, damped(moments.second, 1.0), moments)
    assert error(ridged) < min(error(free), error(weight))
    np.testing.assert_allclose(best_real(weight, damped(moments.second, 1e9), moments), weight, atol=1e-5)
