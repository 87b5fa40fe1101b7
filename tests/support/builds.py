"""Saved graphs of tiny models."""

from pathlib import Path

import onnx_graphsurgeon as gs
from transformers import PreTrainedModel

from rotexport.checkpoint import open_checkpoint
from rotexport.export import export
from rotexport.graph.io import WeightFile, save_model
from rotexport.passes.lasting_positions import LastingPositions
from rotexport.passes.stream_attention import StreamAttention
from rotexport.streaming.cache import FLOAT_CACHE, CacheFormat
from rotexport.streaming.scheme import AttentionScheme

SINKS, WINDOW = 2, 12


SCHEME = AttentionScheme("streaming", SINKS, WINDOW)


def streaming_graph(
    model: PreTrainedModel, cache_format: CacheFormat = FLOAT_CACHE, scheme: AttentionScheme = SCHEME
) -> gs.Graph:
    """Export a model and give it a stream's cache."""
    graph = export(open_checkpoint(model))
    StreamAttention(scheme, cache_format).run(graph)
    LastingPositions().run(graph)
    return graph


def streaming_build(
    model: PreTrainedModel,
    folder: Path,
    cache_format: CacheFormat = FLOAT_CACHE,
    scheme: AttentionScheme = SCHEME,
) -> Path:
    """Write the streaming graph of a model; return its path."""
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    save_model(streaming_graph(model, cache_format, scheme), path, WeightFile(folder / "model.data"))
    return path
