"""The bodies of custom operators: found, well formed, and right wherever bodies run."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from rotexport.errors import GraphError
from rotexport.graph import functions
from rotexport.graph.functions import functions_used, load_function
from rotexport.graph.io import to_proto
from rotexport.transforms.transform import Hadamard

BODIES = sorted(path.stem for path in (Path(functions.__file__).parents[1] / "graphs").glob("*.onnxtxt"))
FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def hadamard_model(transform: Hadamard, dtype: str, rank: int = 3) -> onnx.ModelProto:
    shape = ["batch", "sequence", "more"][: rank - 1]
    x = gs.Variable("x", np.dtype(FLOATS[dtype]), [*shape, transform.size])
    nodes, y = transform.online_nodes("y", x)
    return to_proto(gs.Graph(nodes, [x], [y], opset=23))


def in_onnxruntime(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def in_reference(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


EVALUATORS = {"onnxruntime": in_onnxruntime, "reference": in_reference}


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize(
    "size_and_block", [(1, 1), (12, 12), (64, 64), (96, 12), (576, 576), (1536, 512), (344, 344)]
)
def test_fast_hadamard_is_the_dense_product(size_and_block: tuple[int, int], evaluator: str) -> None:
    transform = Hadamard(*size_and_block, seed=3)
    model = hadamard_model(transform, "float32")
    onnx.checker.check_model(model)
    x = np.random.default_rng(0).standard_normal((2, 3, transform.size)).astype(np.float32)
    y = EVALUATORS[evaluator](model, x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, x @ transform.dense(), atol=3e-6)  # values to 4: a few units of 2^-22


@pytest.mark.parametrize("n", [12, 64, 128, 1536, 11008])
@pytest.mark.parametrize(
    ("dtype", "evaluator"), [("float16", "onnxruntime"), ("float16", "reference"), ("bfloat16", "reference")]
)
def test_half_precision_rounds_but_does_not_shift_the_scale(dtype: str, evaluator: str, n: int) -> None:
    """Five roundings (signs, two products, two tables), each at most half a unit of a vector's length.

    The length itself, to which roundings contribute by chance only, stays within a tenth of a unit: 1/√12 or
    1/√128 rounded to 8 bits and left so would be off by a whole one.
    """
    transform = Hadamard(n, n, seed=1)
    unit = float(ml_dtypes.finfo(FLOATS[dtype]).eps)
    rows = max(4, 65536 // n)
    x = np.random.default_rng(n).standard_normal((1, rows, n)).astype(FLOATS[dtype])
    y = EVALUATORS[evaluator](hadamard_model(transform, dtype), x)
    assert y.dtype == FLOATS[dtype]
    exact = transform.apply(x.astype(np.float64))
    result = y.astype(np.float64)
    assert np.linalg.norm(result - exact) < 2.5 * unit * np.linalg.norm(exact)
    assert abs((result * exact).sum() / (exact**2).sum() - 1) < 0.1 * unit


@pytest.mark.parametrize("n", [12, 4096, 18944, 32768])
def test_float16_does_not_overflow_on_the_way(n: int) -> None:
    """All of a vector's length in one column of the result, or in one of the input, stays in range."""
    transform = Hadamard(n, n)
    peak = 40_000.0
    ends = np.zeros((2, n))
    ends[0, n // 2] = ends[1, -1] = peak
    spread = transform.inverse().apply(ends)
    model = hadamard_model(transform, "float16", rank=2)
    np.testing.assert_allclose(in_onnxruntime(model, spread.astype(np.float16)), ends, atol=peak * 2e-3)
    np.testing.assert_allclose(
        in_onnxruntime(model, ends.astype(np.float16)), transform.apply(ends), rtol=4e-3, atol=1e-3
    )


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
@pytest.mark.parametrize(("dtype", "rank"), [("float16", 2), ("float16", 4), ("bfloat16", 3), ("float32", 3)])
def test_tensorrt_rtx_builds_the_body(tmp_path: Path, dtype: str, rank: int) -> None:
    """With dynamic shapes, and the attribute that names a plugin it does not have."""
    path = tmp_path / "model.onnx"
    onnx.save(hadamard_model(Hadamard(1536, 1536, 1), dtype, rank), path)
    # A child process: the builder aborts the process on some errors.
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(path), *(["1536"] + ["7"] * (rank - 1))[::-1]],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr


BUILD = """
import sys
import tensorrt_rtx as trt

path, *largest = sys.argv[1:]
log = trt.Logger(trt.Logger.WARNING)
builder = trt.Builder(log)
network = builder.create_network(0)
parser = trt.OnnxParser(network, log)
assert parser.parse_from_file(path), parser.get_error(0)
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
profile = builder.create_optimization_profile()
largest = [int(extent) for extent in largest]
profile.set_shape("x", [1] * (len(largest) - 1) + largest[-1:], largest, largest)
config.add_optimization_profile(profile)
assert builder.build_serialized_network(network, config) is not None
"""


@pytest.mark.parametrize("name", BODIES)
def test_every_body_keeps_the_rules_that_all_runtimes_share(name: str) -> None:
    function = load_function(name)
    onnx.checker.check_function(function)
    assert (function.domain, function.name, function.overload) == ("rotexport", name, "")
    for node in function.node:
        assert all(node.input), f"{node.op_type} leaves an input out"
        assert all(node.output), f"{node.op_type} leaves an output unnamed"
    assert not onnx.defs.has(name), "TensorRT looks operators up by this name alone"


def test_a_graph_carries_each_body_it_uses_once() -> None:
    x = gs.Variable("x", np.dtype(np.float32), [2, 64])
    first, middle = Hadamard(64, 64, 1).online_nodes("middle", x)
    second, y = Hadamard(64, 64, 2).online_nodes("y", middle)
    assert [f.name for f in functions_used(gs.Graph([*first, *second], [x], [y]))] == ["FastHadamard"]
    plain = gs.Node("FastHadamard", "elsewhere", inputs=[x], outputs=[y], domain="other")
    assert functions_used(gs.Graph([plain], [x], [y])) == []


@pytest.mark.parametrize("name", ["NoSuchOperator", "../FastHadamard", ""])
def test_an_operator_without_a_body_is_refused(name: str) -> None:
    with pytest.raises(GraphError, match=f"operator '{name}' .* has no body"):
        load_function(name)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("Wrong (x) => (y) { y = ", "does not parse"),
        (
            '<domain: "rotexport", opset_import: ["": 23]> Right (x) => (y) { y = Identity (x) }',
            "not 'rotexport::Wrong'",
        ),
    ],
)
def test_a_spoilt_body_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, complaint: str
) -> None:
    (tmp_path / "Wrong.onnxtxt").write_text(text)
    monkeypatch.setattr(functions, "_FOLDER", tmp_path)
    with pytest.raises(GraphError, match=complaint):
        load_function("Wrong")
