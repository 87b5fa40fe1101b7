"""The kernels' C structures, as the emulator's tests and the GPU scripts pass them."""

from __future__ import annotations

import ctypes


class HadamardProblem(ctypes.Structure):
    """fast_hadamard::Problem."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("output", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("rows", "row", "base_order", "sylvester_order")),
        ("clip", ctypes.c_float),
    )


class LinearProblem(ctypes.Structure):
    """quantized_linear::Problem."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("format", "type", "ending")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "group", "groups", "row_scales")),
        ("two_level", ctypes.c_bool),
        ("asymmetric", ctypes.c_bool),
    )


class AttentionProblem(ctypes.Structure):
    """sink_window_attention::Problem."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("format", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "query_heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_size", "value_size", "sinks", "window", "recent")),
        *((name, ctypes.c_int64) for name in ("key_groups", "value_groups", "angles", "rotated")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )
