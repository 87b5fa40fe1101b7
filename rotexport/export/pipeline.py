"""The exporter, top to bottom."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from transformers import PreTrainedModel

from rotexport.checkpoint import Checkpoint
from rotexport.errors import UnsupportedModelError
from rotexport.export.bind import bind_weights
from rotexport.export.blocks import BlockPlan, decoder_layers, plan_blocks, same_blocks
from rotexport.export.canonical import canonicalize
from rotexport.export.replicate import InseparableBlocksError, replicate
from rotexport.export.skeleton import hollow_model
from rotexport.export.trace import ATTENTION, register_interfaces, trace


def export(checkpoint: Checkpoint) -> gs.Graph:
    """Export a decoder to the canonical graph; weights stay references into the checkpoint.

    Inputs are `input_ids` [batch, sequence], `attention_mask` [batch, total] with total = past + sequence (1
    for real tokens, padding on the left), `position_ids` [batch, sequence] and
    `past_key_values.N.key|value` [batch, key/value heads, past, head size]; outputs `logits` [batch,
    sequence, vocabulary] and `present.N.key|value`. Every distinct kind of decoder block is traced once.

    Raises:
        UnsupportedModelError: the architecture holds a piece without a canonical form.
        CheckpointError: a weight is missing or has the wrong shape.

    """
    register_interfaces()
    model = hollow_model(checkpoint.config, ATTENTION, checkpoint.trust_remote_code)
    prefix, layers = decoder_layers(model)
    whole = BlockPlan(model.config, tuple(range(len(layers))))
    try:
        graph = _assemble(*_truncated(model, checkpoint.trust_remote_code), prefix)
    except InseparableBlocksError:
        graph = _assemble(model, whole, prefix)
    bind_weights(graph, 3 + 2 * len(layers), checkpoint.weight)
    return graph


def _truncated(model: PreTrainedModel, trust_remote_code: bool) -> tuple[PreTrainedModel, BlockPlan]:
    """Build a model that holds each kind of block once, and say how the whole is copied from it."""
    try:
        plan = plan_blocks(model)
        few = hollow_model(plan.config, ATTENTION, trust_remote_code)
    except (ValueError, TypeError, UnsupportedModelError) as error:
        raise InseparableBlocksError(f"the config allows no fewer layers: {error}") from error
    if not same_blocks(model, plan, few):
        raise InseparableBlocksError("a model with fewer layers has other blocks")
    return few, plan


def _assemble(model: PreTrainedModel, plan: BlockPlan, prefix: str) -> gs.Graph:
    graph = trace(model)
    canonicalize(graph)
    return replicate(graph, plan.source, prefix)
