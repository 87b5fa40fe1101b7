"""Opening a saved graph for what it is: one whose cache is bounded, or one whose cache grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rotexport.errors import TargetError
from rotexport.output import MODEL
from rotexport.runtime.bounded import CALL_TOKENS, BoundedGraph
from rotexport.runtime.cached import CachedGraph
from rotexport.runtime.engine import has_engine, open_engine
from rotexport.runtime.growing import NO_LIMIT, GrowingGraph
from rotexport.runtime.model import OnnxModel, open_session


def open_graph(
    path: Path,
    *,
    threads: int | None = None,
    call_tokens: int | None = None,
    extra_outputs: Sequence[str] = (),
) -> CachedGraph:
    """Open a saved decoder in ONNX Runtime.

    Args:
        path: the `.onnx` file.
        threads: number of threads; None leaves the choice to ONNX Runtime.
        call_tokens: most tokens per call; by default what suits the graph.
        extra_outputs: inner tensors that `observe` may return.

    Raises:
        TargetError: ONNX Runtime is not installed, or refuses the file, or it is no decoder.

    """
    session = open_session(path, threads, extra_outputs=extra_outputs)
    if any(node.name == "past_length" for node in session.get_inputs()):
        return BoundedGraph(path, session, call_tokens or CALL_TOKENS)
    return GrowingGraph(OnnxModel.over(path, session), call_tokens or NO_LIMIT)


def open_build(folder: Path, runtime: str = "auto", plugins: Path | None = None) -> CachedGraph:
    """Open a build on `onnxruntime` or on its `engine`; `auto` takes the engine where one fits the GPU.

    Raises:
        TargetError: the build cannot run so.

    """
    if runtime == "engine" or (runtime == "auto" and has_engine(folder)):
        return open_engine(folder, plugins)
    if plugins is not None:
        raise TargetError(f"ONNX Runtime runs no plugins; leave out --plugins {plugins}")
    return open_graph(folder / MODEL)
