"""Engines built without a GPU: every scheme becomes the kernel it asks for, and fallbacks are caught.

One graph holds one MatMul per scheme, so that a single build checks them all.
"""

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from rotexport.errors import OutputError, TargetError
from rotexport.graph.io import WeightFile, save_model
from rotexport.passes.quantize_activations import QuantizeActivations
from rotexport.passes.quantize_weights import QuantizeWeights
from rotexport.quant.calibrate import InputStatistics
from rotexport.quant.plan import SitePlan
from rotexport.quant.scheme import ActivationScheme, WeightScheme
from rotexport.targets import builder
from rotexport.targets.builder import EngineRequest, build_engines
from rotexport.targets.layers import Kernel, expected_kernel, kernels
from rotexport.targets.profiles import Profiles

pytest.importorskip("tensorrt_rtx")

K, N = 128, 96
HALF = np.dtype(np.float16)
DYNAMIC8 = ActivationScheme("int8", "dynamic")
SCHEMES = {
    "float": (WeightScheme(), ActivationScheme()),
    "w8a16": (WeightScheme("int8"), ActivationScheme()),
    "w4a16": (WeightScheme("int4", 32), ActivationScheme()),
    "w8a8": (WeightScheme("int8"), ActivationScheme("int8")),
    "w8a8_dynamic": (WeightScheme("int8"), DYNAMIC8),
    "w8a8_groups": (WeightScheme("int8", 32), DYNAMIC8),
    "w4a8": (WeightScheme("int4"), DYNAMIC8),
    "w4a8_two_level": (WeightScheme("int4", 32), DYNAMIC8),
    "w4a8_zero_points": (WeightScheme("int4", 32, symmetric=False), DYNAMIC8),
    "w4a4_zero_points": (
        WeightScheme("int4", 32, symmetric=False),
        ActivationScheme("int4", "dynamic", group=32),
    ),
    "w4a4_groups": (WeightScheme("int4", 32), ActivationScheme("int4", "dynamic", group=32)),
    "w4a4_asymmetric": (WeightScheme("int4", 32), ActivationScheme("int4", "dynamic", symmetric=False)),
    "w4a4_asymmetric_groups": (
        WeightScheme("int4", 32),
        ActivationScheme("int4", "dynamic", group=32, symmetric=False),
    ),
    "fp8": (WeightScheme("fp8"), ActivationScheme("fp8")),
}
STATISTICS = InputStatistics(np.full(4, 3.0), np.full(K, 3.0), 3.0, np.full(64, 8))


def linears(sites):
    """Make a graph y_site = x_site W_site in half precision, with dynamic batch and length.

    Each site has its own input: products that share one may be merged, in the widest format among them.
    """
    rng = np.random.default_rng(0)
    nodes, inputs, outputs = [], [], []
    for site in sites:
        inputs.append(gs.Variable(f"{site}.x", HALF, ["batch", "sequence", K]))
        weight = gs.Constant(f"{site}.weight", (rng.standard_normal((K, N)) / 8).astype(HALF))
        outputs.append(gs.Variable(f"{site}.y", HALF, ["batch", "sequence", N]))
        nodes.append(gs.Node("MatMul", site, {}, [inputs[-1], weight], [outputs[-1]]))
    return gs.Graph(nodes, inputs, outputs, opset=23)


def quantized(schemes):
    graph = linears(schemes)
    plan = [SitePlan(site, site, K, *scheme) for site, scheme in schemes.items()]
    QuantizeWeights(plan).run(graph)
    QuantizeActivations(plan, dict.fromkeys(schemes, STATISTICS)).run(graph)
    return graph


def expected(schemes):
    return {site: expected_kernel(w.format, a.format, "fp16") for site, (w, a) in schemes.items()}


def request(graph, folder, gpus, wanted):
    path = folder / "model.onnx"
    save_model(graph, path, WeightFile(folder / "model.data"))
    return EngineRequest(path, "tensorrt-rtx", gpus, Profiles(max_batch=2, max_length=64), wanted)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    heard = []
    asked = request(quantized(SCHEMES), folder, ("sm89", "sm120"), expected(SCHEMES))
    return build_engines(asked, folder / "engines", heard.append), heard, folder


def test_one_plan_per_gpu_and_nothing_else_is_left(engines):
    reports, heard, folder = engines
    assert heard == ["tensorrt-rtx-sm89", "tensorrt-rtx-sm120"]
    assert sorted(p.name for p in (folder / "engines").iterdir()) == [
        f"{name}.plan" for name in sorted(heard)
    ]
    assert [report.size for report in reports] == [report.path.stat().st_size for report in reports]
    assert sorted(p.name for p in folder.iterdir()) == ["engines", "model.data", "model.onnx"]


@pytest.mark.parametrize("site", SCHEMES)
def test_each_scheme_becomes_its_kernel(engines, site):
    for report in engines[0]:
        assert kernels(report.layers)[site] == {expected(SCHEMES)[site]}


@pytest.mark.parametrize(
    "site", ["w4a16", "w4a8", "w4a8_two_level", "w4a8_zero_points", "w4a4_groups", "w4a4_zero_points"]
)
def test_four_bit_weights_stay_four_bits_in_the_plan(engines, site):
    for report in engines[0]:
        stored = {
            operand.dtype
            for layer in report.layers
            if any(origin == site or origin.startswith(f"{site}.weight") for origin in layer.origins)
            for operand in layer.constants
            if np.prod(operand.shape) == K * N
        }
        assert stored == {"Int4"}


def test_integer_products_keep_a_float32_accumulator(engines):
    for report, site in itertools.product(
        engines[0], ["w8a8", "w8a8_dynamic", "w4a8_two_level", "w4a8_zero_points", "w4a4_groups"]
    ):
        gemms = [layer for layer in report.layers if layer.kernel is Kernel.INT8 and site in layer.origins]
        assert [output.dtype for layer in gemms for output in layer.outputs] == ["Float"]


def test_a_planted_fallback_fails_the_build_and_leaves_no_plan(tmp_path):
    """A scale computed at run time and fed to QuantizeLinear builds, as int8 weights behind float activations."""
    schemes = {"planted": SCHEMES["w8a8"], "sound": SCHEMES["w8a8_dynamic"]}
    graph = quantized(schemes)
    quantizer = next(n for n in graph.nodes if n.op == "QuantizeLinear" and n.name.startswith("planted"))
    runtime_scale = gs.Variable("runtime_scale", np.dtype(np.float32), [])
    magnitude = gs.Variable("magnitude", np.dtype(np.float32), ["batch", "sequence", K])
    nodes = [
        gs.Node("Abs", "magnitude", {}, [quantizer.inputs[0]], [magnitude]),
        gs.Node("ReduceMax", "runtime_scale", {"keepdims": 0}, [magnitude], [runtime_scale]),
    ]
    place = graph.nodes.index(quantizer)
    graph.nodes[place:place] = nodes
    dequantizer = quantizer.outputs[0].outputs[0]
    quantizer.inputs[1] = dequantizer.inputs[1] = runtime_scale
    asked = request(graph, tmp_path, ("sm89",), expected(schemes))
    with pytest.raises(TargetError, match=r"1 of 2 products .*\n  planted: int8 weight-only, not int8 gemm$"):
        build_engines(asked, tmp_path / "engines", lambda name: None)
    assert list((tmp_path / "engines").iterdir()) == []


def test_what_the_builder_says_is_in_the_error(tmp_path):
    schemes = {"w4a16": SCHEMES["w4a16"]}
    asked = request(quantized(schemes), tmp_path, ("sm75",), expected(schemes))
    with pytest.raises(TargetError, match=r"tensorrt-rtx-sm75 failed.*(.|\n)*HW-specific datatypes: int4"):
        build_engines(asked, tmp_path / "engines", lambda name: None)
    assert list((tmp_path / "engines").iterdir()) == []


def test_a_crashing_builder_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text("import os; print('last words', flush=True); os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(builder, "MODULES", {"tensorrt-rtx": "crashing"})
    asked = request(linears(["float"]), tmp_path, ("sm89",), {})
    with pytest.raises(TargetError, match="ended by signal 6; it said:\n  last words"):
        build_engines(asked, tmp_path / "engines", lambda name: None)


def test_a_graph_that_would_run_wrongly_is_not_built(tmp_path):
    graph = quantized({"w8a8": SCHEMES["w8a8"]})
    next(n for n in graph.nodes if n.op == "QuantizeLinear").attrs.pop("output_dtype")
    with pytest.raises(TargetError, match="without output_dtype"):
        build_engines(request(graph, tmp_path, ("sm89",), {}), tmp_path / "engines", lambda name: None)


def test_an_unwritable_directory_is_an_error(tmp_path):
    (tmp_path / "engines").write_text("a file")
    asked = request(linears(["float"]), tmp_path, ("sm89",), {})
    with pytest.raises(OutputError, match="cannot write engines"):
        build_engines(asked, tmp_path / "engines", lambda name: None)
    assert not Path(f"{tmp_path}/model.tensorrt-rtx.onnx").exists()


ATTENTION = """<ir_version: 11, opset_import: ["": 23]>
g (%(t)s[batch, 4, sequence, 16] q, %(t)s[batch, 2, total, 16] k, %(t)s[batch, 2, total, 16] v,
   %(t)s[batch, 1, sequence, total] m) => (%(t)s[batch, 4, sequence, 16] y)
{ [attend] y = Attention<%(a)sscale = 0.25>(q, k, v, m) }"""


@pytest.mark.parametrize(
    ("dtype", "attributes", "fused"),
    [("float16", "", True), ("float", "", False), ("float16", "softcap = 5.0, ", False)],
)
def test_attention_builds_fused_or_decomposed(tmp_path, dtype, attributes, fused):
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(ATTENTION % {"t": dtype, "a": attributes}), path)
    asked = EngineRequest(path, "tensorrt-rtx", ("sm89",), Profiles(2, 64), {})
    (report,) = build_engines(asked, tmp_path, lambda name: None)
    assert any("mha" in layer.name for layer in report.layers) is fused


CALLS = """<ir_version: 11, opset_import: ["": 23, "rotexport": 1]>
g (float16[batch, sequence, 32] x) => (float16[batch, sequence, 32] y) <int8[2, 2] table = {1, 1, 1, -1}> {
  [once] a = rotexport.Pairs<plugin_namespace = "rotexport">(x, table)
  b = Tanh(a)
  [twice] y = rotexport.Pairs<plugin_namespace = "rotexport">(b, table)
}
<domain: "rotexport", opset_import: ["": 23]>
Pairs (x, table) => (y) {
  one = Constant<value_float = 1.0>()
  float_table = DequantizeLinear(table, one)
  matrix = CastLike(float_table, x)
  rows = Constant<value_ints = [-1, 2]>()
  pairs = Reshape(x, rows)
  mixed = MatMul(pairs, matrix)
  shape = Shape(x)
  y = Reshape(mixed, shape)
}"""


def test_an_operator_that_dequantizes_a_table_can_be_called_twice(tmp_path):
    """TensorRT-RTX's own inlining gives both DequantizeLinear one name, and fails."""
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(CALLS), path)
    asked = EngineRequest(path, "tensorrt-rtx", ("sm89",), Profiles(2, 64), {})
    (report,) = build_engines(asked, tmp_path, lambda name: None)
    assert "Int8" not in {operand.dtype for layer in report.layers for operand in layer.constants}
