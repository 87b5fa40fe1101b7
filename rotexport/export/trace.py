"""From a weightless transformers model to an ONNX graph with marked block boundaries.

Attention and masks enter through transformers' own interfaces: the attention function emits one ONNX
`Attention` node, the mask function an additive float mask. The key/value cache concatenates. Forward hooks
put a marker node on the residual stream before the first decoder block and after each, so blocks are found
in the graph without reading names.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_graphsurgeon as gs
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rotexport.errors import UnsupportedModelError
from rotexport.export.blocks import decoder_layers
from rotexport.export.fusions import fuse
from rotexport.graph.io import OPSET

ATTENTION = "rotexport"
MARKER = "Boundary"
MASKED = -3e4  # far below any logit, yet finite in float16
# What transformers passes to attention functions without changing what they compute here: the mask already
# holds the window, and nothing is dropped in evaluation mode.
_HARMLESS = {
    "dropout",
    "sliding_window",
    "position_ids",
    "position_embeddings",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}


def register_interfaces() -> None:
    """Make the attention implementation known to transformers under the name `ATTENTION`."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)


def trace(model: PreTrainedModel) -> gs.Graph:
    """Trace a weightless model into a fused ONNX graph.

    Parameters become inputs of the graph, named as in the state dict; the residual stream passes through
    `Boundary` nodes with attribute `index`: -1 before the first block, N after block N.

    Raises:
        UnsupportedModelError: the model cannot be traced, or its attention holds an unknown piece.

    """
    count = model.config.num_hidden_layers
    past = [f"past_key_values.{n}.{kind}" for n in range(count) for kind in ("key", "value")]
    present = [f"present.{n}.{kind}" for n in range(count) for kind in ("key", "value")]
    with _quiet():
        try:
            arguments, axes = _example_inputs(_cache_shapes(model))
            with _boundaries(model):
                program = torch.onnx.export(
                    _Cached(model).eval(),
                    arguments,
                    dynamic_shapes=axes,
                    dynamo=True,
                    optimize=False,
                    opset_version=OPSET,
                    input_names=["input_ids", "attention_mask", "position_ids", *past],
                    output_names=["logits", *present],
                    verbose=False,
                )
        except Exception as error:
            raise _refusal(model, error) from error
    traced = program.model
    _expose_parameters(traced, model)
    with _quiet():
        optimizer.optimize(traced)
        fuse(traced)
    return gs.import_onnx(ir.to_proto(traced))


class _ConcatCache(Cache):  # type: ignore[misc]  # torch and transformers are not followed
    """A cache whose layers start with given keys and values and grow by concatenation, windowed or not."""

    def __init__(self, past: tuple[torch.Tensor, ...]) -> None:
        super().__init__(layers=[self._layer(*past[n : n + 2]) for n in range(0, len(past), 2)])

    @staticmethod
    def _layer(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        return layer


class _Cached(nn.Module):  # type: ignore[misc]
    """The model as a function of tensors only: the cache comes in and goes out flat."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        cache = _ConcatCache(past)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        grown = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return output.logits, *grown


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Emit ONNX `Attention`; query [B, H, S, D], key and value [B, Hkv, T, D], mask [B, 1, S, T]."""
    owner = type(module).__name__
    for name, given in options.items():
        if given is not None and name not in _HARMLESS | {"scaling", "softcap", "is_causal"}:
            raise UnsupportedModelError(f"{owner} attends with '{name}', which is not exported")
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal) or attention_mask is None:
        raise UnsupportedModelError(f"{owner} attends in both directions; only decoders are exported")
    scale, softcap = options.get("scaling"), options.get("softcap")
    attributes = {"scale": float(scale or query.shape[-1] ** -0.5)}
    mixed = torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, attention_mask),
        attrs=attributes | ({"softcap": float(softcap)} if softcap else {}),
        dtype=query.dtype,
        shape=(*query.shape[:-1], value.shape[-1]),
        version=OPSET,
    )
    return mixed.transpose(1, 2), None


def _mask(
    q_length: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> torch.Tensor:
    """Build the additive mask [B, 1, S, T]: 0 where a query sees a key, `MASKED` elsewhere.

    The queries are the last S of the T positions that `attention_mask` [B, T] covers.
    """
    if use_vmap or attention_mask is None:
        raise UnsupportedModelError(
            "the model overlays a mask of its own on the causal one; it is not exported"
        )
    total = attention_mask.shape[1]
    query = (torch.arange(q_length) + (total - q_length)).view(1, 1, q_length, 1)
    key = torch.arange(total).view(1, 1, 1, total)
    visible = mask_function(None, None, query, key)
    visible = visible & attention_mask.to(torch.bool).view(-1, 1, 1, total)
    return torch.where(visible, 0.0, MASKED)


def _cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return heads and head size of every cache tensor, by a forward pass on shapes alone."""
    cache = DynamicCache()
    # Modules may keep what they compute, and here that is fake: a copy runs. Parameters stay shared, since
    # copying one would give it storage.
    probe = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.int64)
        seen = torch.ones_like(ids)
        probe(input_ids=ids, attention_mask=seen, position_ids=ids, past_key_values=cache, use_cache=True)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [(tensor.shape[1], tensor.shape[3]) for tensor in tensors]


def _example_inputs(cache: list[tuple[int, int]]) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
    batch, sequence, past = 2, 3, 5  # distinct, and neither 0 nor 1, which torch.export would specialize
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    seen = torch.ones(batch, past + sequence, dtype=torch.int64)
    filled = [torch.zeros(batch, heads, past, width) for heads, width in cache]
    b, s, p, t = (torch.export.Dim(name) for name in ("batch", "sequence", "past", "total"))
    axes = ({0: b, 1: s}, {0: b, 1: t}, {0: b, 1: s}, tuple({0: b, 2: p} for _ in cache))
    return (ids, seen, ids.clone(), *filled), axes


def _mark(stream: torch.Tensor, index: int) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        f"rotexport::{MARKER}",
        (stream,),
        attrs={"index": index},
        dtype=stream.dtype,
        shape=stream.shape,
        version=1,
    )


@contextmanager
def _boundaries(model: PreTrainedModel) -> Iterator[None]:
    """Mark the residual stream around every decoder block while the context lasts."""
    _, layers = decoder_layers(model)

    def entering(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_mark(args[0], -1), *args[1:])

    def leaving(index: int) -> Callable[..., Any]:
        def mark(_: nn.Module, __: Any, output: Any) -> Any:
            return (
                (_mark(output[0], index), *output[1:]) if isinstance(output, tuple) else _mark(output, index)
            )

        return mark

    hooks = [layers[0].register_forward_pre_hook(entering)]
    hooks += [layer.register_forward_hook(leaving(index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter: it remarks on initializers without values, and they have none on purpose."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _refusal(model: PreTrainedModel, error: BaseException) -> UnsupportedModelError:
    """Find what a failed trace says about the model."""
    root: BaseException | None = error
    while root is not None:
        if isinstance(root, UnsupportedModelError):
            return root
        error, root = root, root.__cause__ or root.__context__
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UnsupportedModelError(f"{type(model).__name__} cannot be traced: {reason}")


def _expose_parameters(traced: ir.Model, model: PreTrainedModel) -> None:
    """Turn weightless initializers into graph inputs, one per tensor however many names it has."""
    names = {id(tensor): name for name, tensor in reversed(list(model.state_dict(keep_vars=True).items()))}
    aliases = {
        f"model.{name}": names[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()
    }
    exposed: dict[str, ir.Value] = {}
    for name, value in list(traced.graph.initializers.items()):
        if name not in aliases:
            continue
        del traced.graph.initializers[name]
        value.const_value = None
        first = exposed.get(aliases[name])
        if first is not None:
            value.replace_all_uses_with(first)
            continue
        value.name = aliases[name]
        exposed[value.name] = value
        traced.graph.inputs.append(value)
