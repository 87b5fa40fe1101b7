"""Inputs and float64 references for FastHadamard, shared by the tests of its kernels, bodies and plugins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort

from rotexport.graph.functions import load_function
from rotexport.transforms.orders import base_matrix

LARGEST_CODE = {"int8": 127, "int4": 7}


def sylvester(order: int) -> np.ndarray:
    """Return Sylvester's matrix by its formula: entry (i, j) is minus one to the number of common bits."""
    index = np.arange(order)
    common = index[:, None] & index
    bits = sum((common >> shift) & 1 for shift in range(16))
    return np.where(bits % 2, -1, 1).astype(np.int8)


@dataclass(frozen=True)
class Case:
    """x [rows, width] through blocks of length base * power."""

    base: int
    power: int
    rows: int
    blocks: int = 1

    @property
    def length(self) -> int:
        return self.base * self.power

    @property
    def width(self) -> int:
        return self.length * self.blocks

    def __str__(self) -> str:
        return f"{self.rows}x{self.blocks}x({self.base}*{self.power})"

    def matrix(self) -> np.ndarray:
        return base_matrix(self.base)

    def inputs(self, dtype: np.dtype, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return x, with a few outliers as real activations have, and signs, both of `dtype`."""
        rng = np.random.default_rng([seed, self.base, self.power, self.rows])
        x = rng.standard_normal((self.rows, self.width))
        x[rng.random(x.shape) < 0.01] *= 30
        return x.astype(dtype), rng.choice([-1.0, 1.0], self.width).astype(dtype)

    def reference(self, x: np.ndarray, signs: np.ndarray) -> np.ndarray:
        """Return the transform in float64: each block, as a matrix [base, power], times dense factors."""
        high = 2 ** (self.power.bit_length() // 2)
        low = self.power // high
        blocks = (x.astype(np.float64) * signs.astype(np.float64)).reshape(-1, self.base, high, low)
        left, middle, right = (m.astype(np.float64) for m in (self.matrix(), sylvester(high), sylvester(low)))
        mixed = np.einsum("nabc,ai,bj->nijc", blocks, left, middle, optimize=True) @ right
        return mixed.reshape(x.shape) / np.sqrt(self.length)

    def bound(self, x: np.ndarray) -> np.ndarray:
        """Return the kernel's error bound before the last rounding (fast_hadamard.h), for each element."""
        order = 16 if self.base <= 8 else self.base
        sums = np.abs(x.astype(np.float64)).reshape(self.rows, self.blocks, self.length).sum(axis=2)
        per_block = (2 * order + np.log2(self.length) + 4) * 2.0**-24 * sums / np.sqrt(self.length)
        return np.repeat(per_block, self.length, axis=1)


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """Return int4 codes [rows, width] from bytes [rows, width / 2], the even element in the low nibble."""
    pairs = (
        np.stack([packed & 15, packed.view(np.uint8) >> 4], axis=-1).reshape(len(packed), -1).astype(np.int8)
    )
    return np.where(pairs > 7, pairs - 16, pairs).astype(np.int8)


def model_of(
    operator: str, case: Case, x: np.ndarray, signs: np.ndarray, clip: float = 1.0
) -> onnx.ModelProto:
    """Return a model of one node with the operator's body, for x and signs of these shapes and types."""
    high = 2 ** (case.power.bit_length() // 2)
    constants = {"base": case.matrix(), "hi": sylvester(high), "lo": sylvester(case.power // high)}
    outputs = ["y"] if operator == "FastHadamard" else ["y", "scale"]
    attributes = {} if operator == "FastHadamard" else {"clip": clip}
    node = onnx.helper.make_node(
        operator,
        ["x", "signs", *constants],
        outputs,
        domain="rotexport",
        plugin_namespace="rotexport",
        plugin_version="1",
        **attributes,
    )
    kind = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
    code_kind = kind if operator == "FastHadamard" else onnx.TensorProto.INT8
    kinds = {"y": code_kind, "scale": onnx.TensorProto.FLOAT}
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [
            onnx.helper.make_tensor_value_info("x", kind, x.shape),
            onnx.helper.make_tensor_value_info("signs", kind, signs.shape),
        ],
        [onnx.helper.make_tensor_value_info(name, kinds[name], None) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("rotexport", 1)]
    return onnx.helper.make_model(
        graph, opset_imports=opsets, ir_version=11, functions=[load_function(operator)]
    )


def run_body(
    operator: str, case: Case, x: np.ndarray, signs: np.ndarray, clip: float = 1.0
) -> list[np.ndarray]:
    """Run the operator's ONNX body in ONNX Runtime."""
    model = model_of(operator, case, x, signs, clip)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "signs": signs})
