"""The bodies of the QuantizedLinear operators against integer references."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator
from support.quantized_linear import BFLOAT16, HALF, Case, Operands, feeds, model_of, variants

from rotexport.targets.inlining import inline

FORMS = [Case(form, rows=3, inputs=160, outputs=5, group=64) for form in ("W8A8", "W4A8", "W4A4")]
OPERATORS = [case for base in FORMS for case in variants(base)]


def in_onnxruntime(case: Case, operands: Operands) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    model = model_of(case, operands)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds(model, operands))[0]


def assert_within(y: np.ndarray, operands: Operands) -> None:
    assert y.dtype == operands.case.out
    assert np.all(np.abs(y.astype(np.float64) - operands.reference()) <= operands.bound())


@pytest.mark.parametrize("case", OPERATORS, ids=str)
def test_body_is_the_formula_within_rounding(case: Case) -> None:
    """K = 160 with groups of 64: the last group is short."""
    operands = case.operands(extreme=True)
    assert_within(in_onnxruntime(case, operands), operands)
    half = replace(case, out=HALF)
    assert_within(in_onnxruntime(half, half.operands()), half.operands())


@pytest.mark.parametrize("group", [32, 96, 128, 256])
@pytest.mark.parametrize("form", ["W8A8", "W4A8", "W4A4"])
def test_scales_per_row_and_group(form: str, group: int) -> None:
    case = Case(form, rows=3, inputs=320, outputs=4, group=group, row_groups=True)
    operands = case.operands()
    assert_within(in_onnxruntime(case, operands), operands)


@pytest.mark.parametrize(("form", "inputs"), [("W8A8", 4704), ("W4A8", 8736), ("W4A4", 16448)])
def test_long_sums_stay_exact(form: str, inputs: int) -> None:
    """Sums past 2^24, of an odd number of chunks: the integers come out whole, with scales of one."""
    case = Case(form, rows=2, inputs=inputs, outputs=3, group=inputs)
    plain = case.operands(extreme=True)
    ones = replace(
        plain,
        x_scale=np.ones_like(plain.x_scale),
        weight_scale=np.ones_like(plain.weight_scale),
        bias=np.zeros_like(plain.bias),
    )
    sums = ones.group_sums()[0]
    if form != "W4A4":
        assert np.abs(sums).max() > 2**23
    np.testing.assert_array_equal(in_onnxruntime(case, ones), sums.astype(np.float32))


def test_the_reference_evaluator_agrees() -> None:
    case = replace(FORMS[1], two_level=True, out=BFLOAT16)
    operands = case.operands()
    model = model_of(case, operands)
    onnx.checker.check_model(model)
    assert_within(ReferenceEvaluator(model).run(None, feeds(model, operands))[0], operands)


BUILD = """
import sys
import tensorrt_rtx as trt

log = trt.Logger(trt.Logger.WARNING)
for path in sys.argv[1:]:
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(path), parser.get_error(0)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        width = list(tensor.shape)[1:]
        profile.set_shape(tensor.name, [1, *width], [7, *width], [16, *width])
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None, path
"""


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_tensorrt_rtx_builds_every_body(tmp_path: Path) -> None:
    """As the engine builder hands them over, expanded, with a dynamic number of rows."""
    paths = []
    for case in OPERATORS:
        half = replace(case, out=HALF)
        path = tmp_path / f"{case.operator}.onnx"
        onnx.save(inline(model_of(half, half.operands(), dynamic=True), tmp_path), path)
        paths.append(str(path))
    built = subprocess.run(  # a child process: the builder aborts the process on some errors
        [sys.executable, "-c", BUILD, *paths], capture_output=True, text=True, timeout=300, check=False
    )
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
