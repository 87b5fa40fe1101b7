"""From the names in a file to the names in the model, and the check that nothing is missing or left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from rotexport.errors import CheckpointError
from rotexport.graph.weights import Weight

FLOATS = tuple(np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16))

# Constants that older transformers versions stored and newer ones compute.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")
# Parts of a multimodal model besides its language model.
_OTHER_MODALITIES = re.compile(
    r"^(model\.)?(vision|audio|image|visual|multi_?modal|embed_vision|embed_audio)"
)


def to_model_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Map stored names to names in `model`, as transformers renames them on loading.

    Raises:
        CheckpointError: transformers would not only rename a tensor but compute with it.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    result = {}
    for name in stored:
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converter is not None:
            raise CheckpointError(
                f"tensor {name!r} is stored in a layout that transformers rearranges on loading; "
                "load the model with transformers and pass the model object instead of its path"
            )
        result[name] = renamed
    return result


def to_text_names(stored: Iterable[str]) -> dict[str, str]:
    """Map the names of a multimodal checkpoint to those of its language model alone; the rest is left out."""
    result = {}
    for name in stored:
        if not _OTHER_MODALITIES.match(name):
            result[name] = re.sub(r"^model\.language_model\.", "model.", name).removeprefix("language_model.")
    return result


def complete(
    model: PreTrainedModel, tensors: Mapping[str, Weight], ties: Mapping[str, str]
) -> dict[str, Weight]:
    """Return a weight for every name in the model's `state_dict`, in its order.

    Args:
        model: the skeleton.
        tensors: the stored weights by model name.
        ties: further name -> first name of tied parameters, any one of which may be stored.

    Raises:
        CheckpointError: a tensor is missing, left over, or of the wrong shape or type.
    """
    state = model.state_dict()
    _refuse_left_over(model, [name for name in tensors if name not in state])
    found = dict(tensors)
    for name, source in ties.items():
        if source not in found and name in found:
            found[source] = found[name]
    for name, source in ties.items():
        if name not in found and source in found:
            found[name] = found[source]
    missing = [name for name in state if name not in found]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {_listed(missing)}, which its configuration asks for; "
            "download it again, or correct config.json"
        )
    for name, tensor in state.items():
        _check(name, found[name], tuple(tensor.shape))
    return {name: found[name] for name in state}


def _check(name: str, weight: Weight, shape: tuple[int, ...]) -> None:
    if weight.dtype not in FLOATS:
        raise CheckpointError(
            f"tensor {name!r} is stored as {weight.dtype}; float32, float16 and bfloat16 are read: "
            "pass the model before it was quantized, or saved in one of these types"
        )
    if weight.shape != shape:
        raise CheckpointError(
            f"tensor {name!r} has shape {list(weight.shape)}, but the configuration asks for {list(shape)}; "
            "the weights and config.json belong to different models"
        )


def _refuse_left_over(model: PreTrainedModel, names: list[str]) -> None:
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    extra = [
        name for name in names if not _COMPUTED.search(name) and not any(p.search(name) for p in ignored)
    ]
    if extra:
        raise CheckpointError(
            f"the checkpoint holds {_listed(extra)}, which the {type(model).__name__} of its configuration "
            "does not have; adapters must be merged and quantized models given in their original form"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"tensors {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
