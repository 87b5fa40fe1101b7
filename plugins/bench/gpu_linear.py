"""QuantizedLinear problems as PyTorch tensors, and the kernels of a built library that run them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from c_calls import call
from gpu_kernels import TYPES
from structures import LinearProblem

FORMATS = {"W8A8": 0, "W4A8": 1, "W4A4": 2}
ENDINGS = {"": 0, "residual": 1, "gate": 2}
SLICE = 32
OPERANDS = (
    *("x", "x_scale", "x_zero", "weight", "factors", "weight_scale"),
    *("weight_sum", "bias", "other", "y", "workspace"),
)


class _Operands(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in OPERANDS)


@dataclass(frozen=True)
class Linear:
    """x [rows, inputs] times a weight [outputs, inputs].

    `group` None is one scale per output; with `two_level` groups have integer factors, else scales of their
    own, and with `row_groups` rows of x have a scale per group too. `ending` adds a residual or applies a
    gate.
    """

    form: str
    rows: int
    inputs: int
    outputs: int
    group: int | None = None
    two_level: bool = False
    row_groups: bool = False
    ending: str = ""
    dtype: torch.dtype = torch.float16

    def __str__(self) -> str:
        scales = (
            "channel" if self.group is None else f"{'two-level' if self.two_level else 'group'} {self.group}"
        )
        return (
            f"{self.form} {scales}{' rows' * self.row_groups}, {self.rows} x {self.inputs} x {self.outputs}"
        )

    @property
    def length(self) -> int:
        """Elements of a padded row of the weight."""
        group = self.group or SLICE
        return -(-self.inputs // group) * group

    @property
    def groups(self) -> int:
        """Groups of a row, each with a scale or factor."""
        return self.length // self.group if self.group else 1

    @property
    def weight_bits(self) -> int:
        """Bits of a weight's code."""
        return int(self.form[1])

    @property
    def activation_bits(self) -> int:
        """Bits of an activation's code."""
        return int(self.form[3])

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed codes and what scales them."""
        scales = self.groups * self.outputs * (1 if self.two_level else 4)
        return self.outputs * self.length * self.weight_bits // 8 + scales

    def problem(self) -> LinearProblem:
        """Return the problem as the kernels take it."""
        group = self.group or self.length
        row_scales = self.groups if self.row_groups else 1
        sizes = (self.rows, self.inputs, self.outputs, group, self.groups, row_scales)
        return LinearProblem(
            FORMATS[self.form],
            TYPES[self.dtype],
            ENDINGS[self.ending],
            *sizes,
            self.two_level,
            False,
        )

    def operands(self, device: torch.device) -> Operands:
        """Return random operands."""
        scale_rows = 1 if self.two_level else self.groups
        row_scales = self.groups if self.row_groups else 1
        weight = _codes(self.outputs, self.length, self.weight_bits, device)
        factors = _factors(self.groups, self.outputs, device)
        weight[:, self.inputs :] = (factors[-1] >> 4)[:, None] if self.two_level else 0
        return Operands(
            self,
            _codes(self.rows, self.inputs, self.activation_bits, device),
            torch.rand(self.rows, row_scales, device=device) * 0.01 + 0.01,
            weight,
            factors,
            torch.rand(scale_rows, self.outputs, device=device) * 0.001 + 0.001,
            torch.randn(self.outputs, device=device),
            torch.randn(self.rows, self.outputs, device=device).to(self.dtype),
        )


def _codes(rows: int, columns: int, bits: int, device: torch.device) -> torch.Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8, device=device)


def _factors(groups: int, outputs: int, device: torch.device) -> torch.Tensor:
    """Return bytes of factors and zero points with which no code leaves int8."""
    zeros = torch.randint(-8, 8, (groups, outputs), dtype=torch.int8, device=device)
    largest = 127 // torch.maximum(zeros + 8, 7 - zeros)
    factors = 1 + (torch.rand(groups, outputs, device=device) * largest).floor().to(torch.int8)
    return factors | zeros << 4


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return int4 codes [rows, 2 P] as bytes [rows, P], the even element in the low nibble."""
    return (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)


@dataclass(frozen=True)
class Operands:
    """Unpacked codes, scales and bias of a problem; `other` is the residual or the gate."""

    linear: Linear
    x: torch.Tensor
    x_scale: torch.Tensor
    weight: torch.Tensor
    factors: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor
    other: torch.Tensor

    def packed(self) -> dict[str, torch.Tensor]:
        """Return the operands as the kernels read them, by name."""
        linear = self.linear
        made = {
            "x": pack_nibbles(self.x) if linear.activation_bits == 4 else self.x,
            "x_scale": self.x_scale,
            "weight": pack_nibbles(self.weight) if linear.weight_bits == 4 else self.weight,
            "weight_scale": self.weight_scale,
            "bias": self.bias,
        }
        if linear.two_level:
            made["factors"] = self.factors
        return made | ({"other": self.other} if linear.ending else {})

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y in float64, and how far float32 may be off before the last rounding."""
        terms, other = self.terms(), self.other.double()
        y, bound = terms.sum(0), (len(terms) + 5) * 2.0**-24 * terms.abs().sum(0)
        if self.linear.ending == "residual":
            return y + other, bound + 2.0**-24 * (y + other).abs()
        if self.linear.ending == "gate":  # the exponential is off by a few units
            gate = torch.nn.functional.silu(other)
            return y * gate, bound * gate.abs() + 12 * 2.0**-24 * (y * gate).abs()
        return y, bound

    def terms(self) -> torch.Tensor:
        """Return in float64 what y is the sum of: [terms, rows, outputs]; integer sums are exact in it."""
        linear, group = self.linear, self.linear.group or self.linear.length
        x = torch.nn.functional.pad(self.x.double(), (0, linear.length - linear.inputs))
        x = x.reshape(linear.rows, linear.groups, group).transpose(0, 1)
        weight = self.weight.double().reshape(linear.outputs, linear.groups, group)
        if linear.two_level:
            factors, zeros = (part.double().T[:, :, None] for part in (self.factors & 15, self.factors >> 4))
            weight = (weight - zeros) * factors
        sums = x @ weight.permute(1, 2, 0)
        if linear.two_level:
            sums = sums.sum(0, keepdim=True)
        scaled = sums * self.weight_scale.double()[:, None, :] * self.x_scale.double().T[:, :, None]
        return torch.cat([scaled, self.bias.double().expand_as(scaled[:1])])


@dataclass(frozen=True)
class Launch:
    """A kernel bound to its operands: `run` fills `y`."""

    y: torch.Tensor
    run: Callable[[], None]


class LinearKernels:
    """The kernels of a built library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def prepare(self, operands: Operands) -> Launch:
        """Bind the kernel to operands and to a new result, which is poisoned."""
        linear, problem = operands.linear, operands.linear.problem()
        device = operands.x.device
        tensors = operands.packed()
        y = torch.full((linear.rows, linear.outputs), torch.nan, dtype=linear.dtype, device=device)
        workspace_bytes = ctypes.c_size_t()
        call(self._library.quantized_linear_workspace, ctypes.byref(problem), ctypes.byref(workspace_bytes))
        tensors["workspace"] = torch.empty(max(workspace_bytes.value, 1), dtype=torch.uint8, device=device)
        tensors["y"] = y
        return Launch(y, partial(self._launch, problem, tensors))

    def _launch(self, problem: LinearProblem, tensors: dict[str, torch.Tensor]) -> None:
        operands = _Operands(**{name: tensor.data_ptr() for name, tensor in tensors.items()})
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        call(self._library.quantized_linear_run, ctypes.byref(problem), ctypes.byref(operands), stream)
