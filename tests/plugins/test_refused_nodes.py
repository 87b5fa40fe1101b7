"""An engine for TensorRT with the real plugin library: what its kernels refuse reaches the builder as bodies.

TensorRT itself is stood in for: it parses nothing, and its "plan" is the graph it was given.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from driver import Host

from rotexport.graph.io import WeightFile, save_model
from rotexport.targets import builder
from rotexport.targets.acceptance import Refusal
from rotexport.targets.builder import EngineRequest, build_engines
from rotexport.targets.layers import Kernel
from rotexport.targets.profiles import Profiles

STAND_IN = '''
"""What builder_process uses of TensorRT."""

from pathlib import Path
from types import SimpleNamespace

LAYER = "Name: a, LayerType: b, Inputs: , Constants: , Outputs: , TacticName: , StreamId: 0, Metadata: "
ProfilingVerbosity = SimpleNamespace(DETAILED=0)


class ILogger:
    Severity = SimpleNamespace(ERROR=0)

    def __init__(self): ...


class OnnxParser:
    def __init__(self, network, log):
        self.network = network

    def parse_from_file(self, path):
        self.network.model = Path(path).read_bytes()
        return True


class Builder:
    def __init__(self, log):
        self.log = log

    def create_network(self, flags):
        return SimpleNamespace()

    def create_builder_config(self):
        return SimpleNamespace(add_optimization_profile=lambda profile: None)

    def create_optimization_profile(self):
        return SimpleNamespace(set_shape=lambda *shape: None)

    def build_serialized_network(self, network, config):
        self.log.log(1, LAYER)
        return network.model


def get_plugin_registry():
    return SimpleNamespace(load_library=lambda path: path)
'''


def transforms(*widths: int) -> gs.Graph:
    """Return a graph of one FastHadamard of order 1 per width, on inputs [batch, sequence, width]."""
    half = np.dtype(np.float16)
    nodes, inputs, outputs = [], [], []
    one = np.ones((1, 1), np.int8)
    for width in widths:
        inputs.append(gs.Variable(f"x{width}", half, ["batch", "sequence", width]))
        outputs.append(gs.Variable(f"y{width}", half, ["batch", "sequence", width]))
        tables = [gs.Constant(f"{name}{width}", one) for name in ("base", "hi", "lo")]
        signs = gs.Constant(f"signs{width}", np.ones(width, np.float16))
        attributes = {"plugin_namespace": "rotexport", "plugin_version": "1"}
        operands = [inputs[-1], signs, *tables]
        name = f"transform.{width}"
        nodes.append(gs.Node("FastHadamard", name, attributes, operands, [outputs[-1]], domain="rotexport"))
    return gs.Graph(
        nodes, inputs, outputs, opset=23, import_domains=[onnx.helper.make_opsetid("rotexport", 1)]
    )


def test_only_what_the_kernels_take_stays_and_the_report_says_why(
    host: Host, emulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 6 half-precision numbers are no multiple of 4; a kernel is expected of nothing that was expanded."""
    pytest.importorskip("tensorrt_rtx")  # whose registry lists the creators
    assert host.creators()
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(builder, "MODULES", {"tensorrt": "stand_in"})
    save_model(transforms(8, 6, 64), tmp_path / "model.onnx", WeightFile(tmp_path / "model.data"))
    library = next(emulated.glob("librotexport_plugins_trt*.so"))
    kernels = {"transform.6": Kernel.PLUGIN}
    request = EngineRequest(tmp_path / "model.onnx", "tensorrt", ("sm90",), Profiles(2, 64), kernels, library)
    (report,) = build_engines(request, tmp_path / "engines", lambda name: None)
    graph = onnx.load(report.path).graph
    calls = [node.name for node in graph.node if node.domain == "rotexport"]
    assert calls == ["transform.8", "transform.64"]
    assert "MatMul" in {node.op_type for node in graph.node}
    (refused,) = report.refused
    assert (refused.node, refused.operator) == ("transform.6", "FastHadamard")
    assert isinstance(refused, Refusal) and "6" in refused.reason
