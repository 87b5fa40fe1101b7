"""Opening a Hugging Face directory: `config.json` beside safetensors or pickled weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from rotexport.checkpoint.assets import DirectoryAssets
from rotexport.checkpoint.checkpoint import Checkpoint, assemble
from rotexport.checkpoint.names import to_model_names, to_text_names
from rotexport.checkpoint.pickled import read_pickled
from rotexport.checkpoint.safetensors_file import read_header
from rotexport.checkpoint.skeleton import skeleton
from rotexport.errors import CheckpointError, UnsupportedModelError
from rotexport.graph.weights import Weight

_READERS: dict[str, Callable[[Path], dict[str, Weight]]] = {
    "model.safetensors": read_header,
    "pytorch_model.bin": read_pickled,
}


def open_directory(directory: Path, trust_remote_code: bool) -> Checkpoint:
    """Open a model directory; of a multimodal model, the language model.

    Raises:
        CheckpointError: see the message.
        UnsupportedModelError: the architecture is unknown or no causal language model.
    """
    whole, config = read_config(directory, trust_remote_code)
    files, tensors = _find_tensors(directory)
    model = skeleton(config, trust_remote_code)
    if config is not whole:
        texts = to_text_names(tensors)
        tensors = {texts[name]: tensors[name] for name in texts}
    names = to_model_names(model, tensors)
    by_model_name = {names[name]: weight for name, weight in tensors.items()}
    assets = DirectoryAssets(directory, tuple(files), trust_remote_code)
    return assemble(config, model, by_model_name, assets, trust_remote_code)


def read_config(directory: Path, trust_remote_code: bool) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Read `config.json`, refusing what is no model and what is already quantized.

    Returns:
        The configuration, and that of its text part: the same, unless the model is multimodal.
    """
    path = directory / "config.json"
    fields = _read_fields(path)
    try:
        whole = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        text = whole.get_text_config()
    except StrictDataclassError as error:
        raise CheckpointError(f"{path} has an illegal value: {' '.join(str(error).split())}") from error
    except (ValueError, KeyError, OSError, TypeError, ImportError) as error:
        raise UnsupportedModelError(
            f"transformers finds no language model in {path} of type {fields.get('model_type')!r}; "
            "pass a causal language model, and --trust-remote-code if it brings its own code"
        ) from error
    if getattr(whole, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{path}: {whole.model_type!r} is an encoder-decoder; pass a decoder-only model"
        )
    return whole, text


def _read_fields(path: Path) -> dict[str, Any]:
    directory = path.parent
    if not path.is_file():
        ggufs = sorted(file.name for file in directory.glob("*.gguf"))
        hint = f"give one of its GGUF files, such as {ggufs[0]}" if ggufs else "give a model directory"
        raise CheckpointError(f"{directory} has no config.json, so it is not a model; {hint}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    quantization = fields.get("quantization_config") or fields.get("compression_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        )
        raise CheckpointError(
            f"{directory} is already quantized ({method!r}); pass the float model it was made from"
        )
    return fields


def _find_tensors(directory: Path) -> tuple[list[Path], dict[str, Weight]]:
    """Return the weight files and the tensors in them, safetensors preferred."""
    for name, read in _READERS.items():
        path, index = directory / name, directory / f"{name}.index.json"
        if path.is_file():
            return [path], read(path)
        if index.is_file():
            return _read_shards(index, read)
    looked_for = ", ".join(f"{name}, {name}.index.json" for name in _READERS)
    raise CheckpointError(
        f"{directory} has a config.json but no weights (looked for {looked_for}); download the weights too"
    )


def _read_shards(
    index: Path, read: Callable[[Path], dict[str, Weight]]
) -> tuple[list[Path], dict[str, Weight]]:
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a valid index ({error!r}); download it again") from error
    names = sorted(set(weight_map.values()))
    shards = [index.parent / name for name in names]
    missing = [shard.name for shard in shards if shard.parent != index.parent or not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards named in {index.name}, "
            f"the first being {missing[0]}; download them too"
        )
    contents = {shard.name: read(shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in contents[shard]:
            raise CheckpointError(
                f"{index.name} places tensor {name!r} in {shard}, which does not hold it; download both again"
            )
    return [index, *shards], {name: contents[shard][name] for name, shard in weight_map.items()}
