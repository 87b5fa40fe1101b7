"""Tracing without weights."""

import resource

from transformers import LlamaConfig

from rotexport.export.skeleton import hollow_model
from rotexport.export.trace import ATTENTION, register_interfaces, trace


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_tracing_allocates_no_parameter() -> None:
    register_interfaces()
    config = LlamaConfig(
        vocab_size=1 << 23, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = hollow_model(config, ATTENTION, trust_remote_code=False)
    before = peak_bytes()
    graph = trace(model)
    table = (1 << 23) * 64 * 4
    assert peak_bytes() - before < table // 4
    boundaries = [node.attrs["index"] for node in graph.nodes if node.op == "Boundary"]
    assert boundaries == [-1, 0]
    weights = {tensor.name: list(tensor.shape) for tensor in graph.inputs if tensor.name.endswith("weight")}
    assert weights["lm_head.weight"] == weights["model.embed_tokens.weight"] == [1 << 23, 64]
