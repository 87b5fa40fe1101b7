"""The transformers configuration that a GGUF file's metadata describes.

transformers' table names the keys it reads; the few below it leaves out, though they change what the model
computes. What neither covers is refused.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from rotexport.checkpoint.gguf_file import GgufFile
from rotexport.errors import CheckpointError, UnsupportedModelError

ROPE_FACTORS = "rope_freqs.weight"
_MORE_KEYS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_MODEL_TYPES = {"gemma3": "gemma3_text"}
_GEMMA_27B_BLOCKS = {"gemma2": 46, "gemma3": 62}
_LOCAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0}  # Gemma 3's sliding layers


def read_config(file: GgufFile) -> PretrainedConfig:
    """Translate the metadata of a file whose architecture is in transformers' table.

    Raises:
        CheckpointError: a value is missing or illegal.
        UnsupportedModelError: the file scales positions in a way that is not understood.
    """
    architecture = file.metadata["general.architecture"]
    try:
        return AutoConfig.for_model(
            _MODEL_TYPES.get(architecture, architecture), **_fields(file, architecture)
        )
    except (ValueError, TypeError, KeyError, ZeroDivisionError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{file.path} describes no valid {architecture!r} model ({' '.join(str(error).split())}); "
            "download it again"
        ) from error


def _fields(file: GgufFile, architecture: str) -> dict[str, Any]:
    fields = _renamed(file, f"{architecture}.", _MORE_KEYS | GGUF_CONFIG_MAPPING[architecture])
    fields |= _renamed(file, "tokenizer.", GGUF_CONFIG_MAPPING["tokenizer"])
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    if "token_embd.weight" in file.tensors:
        fields["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    if architecture in _GEMMA_27B_BLOCKS:
        fields["query_pre_attn_scalar"] = _gemma_query_scalar(architecture, fields)
    scaling = _rope_scaling(file, architecture, fields)
    if scaling is not None:
        rope = {"rope_theta": fields.pop("rope_theta", 10000.0), **scaling}
        local = {"full_attention": rope, "sliding_attention": _LOCAL_ROPE}
        fields["rope_parameters"] = local if architecture == "gemma3" else rope
    return fields


def _renamed(file: GgufFile, prefix: str, keys: dict[str, str | None]) -> dict[str, Any]:
    return {
        field: file.metadata[prefix + key]
        for key, field in keys.items()
        if field is not None and prefix + key in file.metadata
    }


def _gemma_query_scalar(architecture: str, fields: dict[str, Any]) -> int:
    """Return what attention divides by the root of, which is not in the file: the head size, but for 27B."""
    if fields.get("num_hidden_layers") == _GEMMA_27B_BLOCKS[architecture]:
        return int(fields["hidden_size"] // fields["num_attention_heads"])
    return int(fields.get("head_dim", 256))


def _rope_scaling(file: GgufFile, architecture: str, fields: dict[str, Any]) -> dict[str, Any] | None:
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, fields)
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.metadata[f"{architecture}.rope.scaling.factor"]}
    if kind != "none":
        raise UnsupportedModelError(
            f"{file.path} scales positions by {kind!r}, which is not read from GGUF: "
            "pass the Hugging Face directory that the file was made from"
        )
    return None


def _llama3_scaling(file: GgufFile, fields: dict[str, Any]) -> dict[str, Any]:
    """Recognize Llama 3's frequency scaling, of which a GGUF file keeps only the resulting divisors.

    Wavelengths below 8192/4 keep their frequency, those above 8192/1 have it divided by the factor, and
    between them the frequency is interpolated (Llama 3.1 model card).
    """
    divisors = file.tensors[ROPE_FACTORS].read().astype(np.float64)
    factor, low, high, context = float(divisors.max()), 1.0, 4.0, 8192
    exponents = np.arange(divisors.size) / divisors.size
    wavelengths = 2 * math.pi * fields.get("rope_theta", 10000.0) ** exponents
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise UnsupportedModelError(
            f"{file.path} has frequency divisors ({ROPE_FACTORS}) that are not Llama 3's: "
            "pass the Hugging Face directory that the file was made from"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
