"""Opening a GGUF file: names and layouts back to transformers', weights dequantized one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from transformers import PretrainedConfig, PreTrainedModel

from rotexport.checkpoint.assets import GgufAssets
from rotexport.checkpoint.checkpoint import Checkpoint, assemble
from rotexport.checkpoint.gguf_config import ROPE_FACTORS, read_config
from rotexport.checkpoint.gguf_file import GgufFile, read_gguf
from rotexport.checkpoint.gguf_tensor import HalvesRestored
from rotexport.checkpoint.skeleton import skeleton
from rotexport.errors import CheckpointError, UnsupportedModelError
from rotexport.graph.weights import Affine, Weight


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file.

    Raises:
        CheckpointError: the file is truncated, corrupt or incomplete.
        UnsupportedModelError: its architecture, or its kind of position scaling, is not read from GGUF.
    """
    file = read_gguf(path)
    architecture = str(file.metadata.get("general.architecture"))
    if architecture not in _RESTORE:
        raise UnsupportedModelError(
            f"{path} has architecture {architecture!r}; read from GGUF are {', '.join(_RESTORE)}: "
            "pass the Hugging Face directory that the file was made from"
        )
    config = read_config(file)
    model = skeleton(config)
    names = _model_names(model, file)
    restore = _RESTORE[architecture]
    tensors = {names[name]: restore(name, file.tensors[name], config) for name in names}
    return assemble(config, model, tensors, GgufAssets(path))


def _model_names(model: PreTrainedModel, file: GgufFile) -> dict[str, str]:
    """Map GGUF names to model names, through the table that llama.cpp's converter uses the other way."""
    architecture = file.metadata["general.architecture"]
    (known,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(known, model.config.num_hidden_layers)
    names = {}
    for name in model.state_dict():
        stem, _, suffix = name.rpartition(".")
        names[f"{table.get_name(stem)}.{suffix}"] = name
    unknown = [name for name in file.tensors if name not in names and name != ROPE_FACTORS]
    if unknown:
        raise CheckpointError(
            f"{file.path} holds {len(unknown)} tensors that a {type(model).__name__} does not have, "
            f"such as {unknown[0]!r}; pass the Hugging Face directory that the file was made from"
        )
    return {name: names[name] for name in file.tensors if name in names}


def _as_stored(name: str, weight: Weight, config: PretrainedConfig) -> Weight:
    return weight


def _llama(name: str, weight: Weight, config: PretrainedConfig) -> Weight:
    if ".attn_q." in name:
        return HalvesRestored(weight, config.num_attention_heads)
    if ".attn_k." in name:
        return HalvesRestored(weight, config.num_key_value_heads)
    return weight


def _norms_without_one(name: str, weight: Weight, config: PretrainedConfig) -> Weight:
    """Gemma and Nemotron multiply by 1 + w; llama.cpp stores the sum."""
    return Affine(weight, 1.0, -1.0) if name.endswith("norm.weight") else weight


_RESTORE: dict[str, Callable[[str, Weight, PretrainedConfig], Weight]] = {
    "llama": _llama,
    "qwen2": _as_stored,
    "qwen3": _as_stored,
    "phi3": _as_stored,
    "starcoder2": _as_stored,
    "gemma2": _norms_without_one,
    "gemma3": _norms_without_one,
    "nemotron": _norms_without_one,
}
