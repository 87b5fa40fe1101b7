"""The builder's layer list: which kernel each ONNX node became, read without a GPU.

With detailed profiling verbosity TensorRT and TensorRT-RTX log the final layers of a plan, one a line: name,
kind, every operand's data type and shape, and the ONNX nodes a layer stems from. The format is undocumented,
so the version is pinned and a list without layers is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from rotexport.errors import TargetError

_LAYER: Final = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*), Constants: (?P<constants>.*), "
    r"Outputs: (?P<outputs>.*), TacticName: (?P<tactic>.*?), StreamId: \d+, Metadata: (?P<origins>.*)$",
    re.MULTILINE,
)
_OPERAND: Final = re.compile(r"Name: ([^,]*), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
_ORIGIN: Final = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


class Kernel(Enum):
    """What multiplies two matrices."""

    INT8 = "int8 gemm"
    INT4 = "int4 gemm"
    FP8 = "fp8 gemm"
    INT4_WEIGHTS = "int4 weight-only"
    INT8_WEIGHTS = "int8 weight-only"
    FP8_WEIGHTS = "fp8 weight-only"
    FP16 = "fp16 gemm"
    BF16 = "bf16 gemm"
    FP32 = "fp32 gemm"
    PLUGIN = "kernel of ours"


_PRODUCTS: Final = {
    "Int8": Kernel.INT8,
    "Int4": Kernel.INT4,
    "FP8": Kernel.FP8,
    "Half": Kernel.FP16,
    "BFloat16": Kernel.BF16,
    "Float": Kernel.FP32,
}
_FLOAT: Final = {"fp16": Kernel.FP16, "bf16": Kernel.BF16, "fp32": Kernel.FP32}
_WEIGHT_ONLY: Final = {"Int4": Kernel.INT4_WEIGHTS, "Int8": Kernel.INT8_WEIGHTS, "FP8": Kernel.FP8_WEIGHTS}


@dataclass(frozen=True)
class Operand:
    """A tensor of a layer; a dimension of -1 is dynamic."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One kernel launch of a plan; `origins` are the names of the ONNX nodes it stems from."""

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    origins: tuple[str, ...]

    @property
    def kernel(self) -> Kernel | None:
        """The matrix product this layer is, or None where it is none."""
        if self.kind.startswith("Plugin"):
            return Kernel.PLUGIN
        factors = [o.dtype for o in (*self.inputs, *self.constants) if len(o.shape) > 1]
        if self.kind == "gemm":
            product = set(factors)
            return _PRODUCTS.get(product.pop()) if len(product) == 1 else None
        if self.kind == "runtime_fusion" and "Fc" in self.name:
            weights = [o.dtype for o in self.constants if o.dtype in _WEIGHT_ONLY]
            return _WEIGHT_ONLY[weights[0]] if weights else _PRODUCTS.get(factors[0])
        return None


def parse_layers(text: str) -> list[Layer]:
    """Read the layer list out of a builder's log.

    Raises:
        TargetError: the log holds no layer, so its format has changed.

    """
    layers = [
        Layer(
            found["name"],
            found["kind"],
            _operands(found["inputs"]),
            _operands(found["constants"]),
            _operands(found["outputs"]),
            tuple(_ORIGIN.findall(found["origins"])),
        )
        for found in _LAYER.finditer(text)
    ]
    if not layers:
        raise TargetError(
            "the builder's log lists no layers, so no kernel can be checked; "
            "install the TensorRT-RTX version that `rotexport doctor` names"
        )
    return layers


def kernels(layers: Iterable[Layer]) -> dict[str, frozenset[Kernel]]:
    """Return what each ONNX node that became a matrix product runs as, by node name.

    Builders merge products that share an input (one layer then stems from several nodes), and build one list
    per optimization profile.
    """
    found: dict[str, set[Kernel]] = {}
    for layer in layers:
        if layer.kernel:
            for origin in layer.origins:
                found.setdefault(origin, set()).add(layer.kernel)
    return {origin: frozenset(kinds) for origin, kinds in found.items()}


def assert_kernels(layers: Iterable[Layer], expected: Mapping[str, Kernel], engine: str) -> None:
    """Raise TargetError, listing the sites, when a MatMul did not become the kernel it was meant to be.

    Args:
        layers: the layer list of the plan.
        expected: MatMul node name -> kernel.
        engine: names the plan in the error.

    """
    built = kernels(layers)
    missed = [node for node, kernel in expected.items() if built.get(node) != frozenset({kernel})]
    if missed:
        lines = [f"  {node}: {_names(built.get(node))}, not {expected[node].value}" for node in missed]
        raise TargetError(
            f"{engine}: {len(missed)} of {len(expected)} products are not the kernels the recipe asks for; "
            "choose formats the target runs (see `rotexport doctor`), or override these sites\n"
            + "\n".join(lines)
        )


def expected_kernel(weights: str, activations: str, dtype: str) -> Kernel:
    """Return the kernel that formats of a product ask for; `dtype` is that of its floats.

    4-bit factors are unpacked to int8 in front of an integer product. Float weights keep a float product
    whatever is done to the activations.
    """
    if weights == "none":
        return _FLOAT[dtype]
    if activations == "none":
        return {"int4": Kernel.INT4_WEIGHTS, "int8": Kernel.INT8_WEIGHTS, "fp8": Kernel.FP8_WEIGHTS}[weights]
    return Kernel.FP8 if weights == "fp8" else Kernel.INT8


def _names(built: frozenset[Kernel] | None) -> str:
    return (
        " and ".join(sorted(kernel.value for kernel in built)) if built else "no matrix product of that name"
    )


def _operands(text: str) -> tuple[Operand, ...]:
    return tuple(
        Operand(name, dtype, tuple(int(n) for n in dims.split(",") if n))
        for name, dims, dtype in _OPERAND.findall(text)
    )
