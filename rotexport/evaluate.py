"""Perplexity of a model over consecutive windows of a text, of PyTorch models and saved graphs alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from rotexport.errors import ValidationError
from rotexport.metrics import negative_log_likelihood
from rotexport.runtime.cached import CachedGraph

if TYPE_CHECKING:
    from rotexport.graph.weights import Array

LanguageModel: TypeAlias = CachedGraph | torch.nn.Module


@dataclass(frozen=True)
class Evaluation:
    """Perplexity over windows that each start from an empty cache.

    The first token of a window has nothing before it and is not predicted, so `tokens` is
    `windows * (length - 1)`. `loss` is the mean negative log likelihood in nats.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    length: int

    def to_dict(self) -> dict[str, float]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def evaluate(
    model: LanguageModel, windows: Array, advance: Callable[[int, int], None] = lambda done, of: None
) -> Evaluation:
    """Return the perplexity of `model` over token windows [W, L].

    Args:
        model: a saved graph, or a Hugging Face causal language model in fp32.
        windows: token ids, consecutive pieces of one tokenized text.
        advance: told (windows done, windows in all) after each.

    Raises:
        ValidationError: there is no window, or the model's probabilities are not numbers.

    """
    count, length = windows.shape
    if count == 0 or length < 2:
        raise ValidationError(
            f"perplexity needs windows of two tokens or more, got {count} of {length}: "
            "take a longer text or shorter windows"
        )
    total = 0.0
    for index, window in enumerate(windows):
        logits = next_token_logits(model, window)
        total += negative_log_likelihood(logits[:-1], window[1:])
        advance(index + 1, count)
    tokens = count * (length - 1)
    loss = total / tokens
    if not math.isfinite(loss):
        raise ValidationError(
            f"the model's loss over {tokens} tokens is {loss}: its logits are not all finite"
        )
    return Evaluation(perplexity(loss), loss, tokens, count, length)


def perplexity(loss: float) -> float:
    """Return e^loss, of a mean loss in nats; a loss beyond float64's exponent is reported as the largest."""
    return math.exp(min(loss, 709.0))


def next_token_logits(model: LanguageModel, tokens: Array) -> Array:
    """Return the logits [S, vocab] of the tokens [S], from an empty cache."""
    if isinstance(model, CachedGraph):
        return model.logits(tokens)
    with torch.no_grad():
        ids = torch.from_numpy(np.ascontiguousarray(tokens[None], np.int64))
        result: Array = model(input_ids=ids, use_cache=False).logits[0].float().numpy()
    return result
