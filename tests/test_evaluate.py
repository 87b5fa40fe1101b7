"""Perplexity against the formula, with models whose probabilities are known."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import LlamaConfig, LlamaForCausalLM

from rotexport.errors import ValidationError
from rotexport.evaluate import evaluate, next_token_logits, perplexity
from rotexport.runtime.opening import open_graph

BIGRAM = """
<ir_version: 11, opset_import: ["" : 23]>
bigram (int64[batch, sequence] input_ids) => (float[batch, sequence, 5] logits)
{
    logits = Gather(table, input_ids)
}
"""
WINDOWS = np.array([[0, 1, 2, 3], [4, 4, 0, 1]])


def bigram_model(path, table):
    model = onnx.parser.parse_model(BIGRAM)
    model.graph.initializer.append(numpy_helper.from_array(table.astype(np.float32), "table"))
    path.write_bytes(model.SerializeToString())
    return open_graph(path)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    return LlamaForCausalLM(config).eval()


def test_indifferent_models_have_the_vocabulary_as_perplexity(tmp_path):
    result = evaluate(bigram_model(tmp_path / "flat.onnx", np.zeros((5, 5))), WINDOWS)
    assert result.perplexity == pytest.approx(5.0)


def test_the_first_token_of_each_window_is_not_predicted(tmp_path):
    table = np.random.default_rng(3).normal(size=(5, 5))
    result = evaluate(bigram_model(tmp_path / "bigram.onnx", table), WINDOWS)
    probability = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    pairs = [(0, 1), (1, 2), (2, 3), (4, 4), (4, 0), (0, 1)]  # never from one window into the next
    loss = -np.mean([np.log(probability[pair]) for pair in pairs])
    assert (result.tokens, result.windows, result.length) == (6, 2, 4)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.perplexity == pytest.approx(np.exp(loss), rel=1e-6)
    assert json.loads(json.dumps(result.to_dict()))["perplexity"] == result.perplexity


def test_pytorch_agrees_with_its_own_loss(llama):
    windows = np.random.default_rng(4).integers(0, 32, (3, 10))
    with torch.no_grad():
        losses = [llama(torch.tensor(w[None]), labels=torch.tensor(w[None])).loss.item() for w in windows]
    assert evaluate(llama, windows).loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_logits_do_not_see_the_future(llama):
    tokens = np.arange(8)
    changed = np.where(np.arange(8) == 7, 30, tokens)
    np.testing.assert_allclose(
        next_token_logits(llama, tokens)[:7], next_token_logits(llama, changed)[:7], atol=1e-6
    )


def test_progress_is_told_per_window(llama):
    seen = []
    evaluate(llama, WINDOWS, advance=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("shape", [(0, 4), (3, 1)])
def test_nothing_to_predict_is_refused(llama, shape):
    with pytest.raises(ValidationError, match=f"got {shape[0]} of {shape[1]}"):
        evaluate(llama, np.zeros(shape, np.int64))


def test_undefined_probabilities_are_refused(tmp_path):
    broken = bigram_model(tmp_path / "nan.onnx", np.full((5, 5), np.nan))
    with pytest.raises(ValidationError, match="not all finite"):
        evaluate(broken, WINDOWS)


def test_an_absurd_loss_still_has_a_perplexity():
    assert np.isfinite(perplexity(5000.0))
