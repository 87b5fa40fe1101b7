"""The kernels' C structures, as the emulator's tests and the GPU scripts pass them."""

from __future__ import annotations

import ctypes

FORMATS = {"float": 0, "int8": 1, "int4": 2, "int2": 3, "fp8": 4}  # of an attention's window
POLICIES = {"heavy-hitter": 0, "snapkv": 1}
NEW = ("query", "query_sink", "key", "value")
OTHERS = ("key_mean", "mean_query", "mean_angles", "signs")  # only some operators take
HELD = tuple(f"{part}_{kind}" for part in ("sink", "window") for kind in ("key", "value"))
ATTENTION_CACHE = (*HELD, "window_key_scale", "window_value_scale", "recent_key", "recent_value")
EVICTION_CACHE = (*HELD, "window_position", "window_score")


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


_SIZES = (
    ("type", ctypes.c_int),
    *((name, ctypes.c_int64) for name in ("batch", "tokens", "query_heads", "kv_heads")),
    *((name, ctypes.c_int64) for name in ("head_size", "value_size", "sinks", "window")),
    *((name, ctypes.c_float) for name in ("scale", "softcap")),
)
_CALL = tuple(
    (name, ctypes.c_void_p) for name in (*NEW, "past_length", "new_length", "decay", "output", "workspace")
)


class AttentionProblem(ctypes.Structure):
    """sink_window_attention::Problem."""

    _fields_ = (
        *_SIZES,
        ("format", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("recent", "key_groups", "value_groups", "angles", "rotated")),
    )


class AttentionOperands(ctypes.Structure):
    """sink_window_attention::Operands."""

    _fields_ = (
        *_CALL,
        *((name, ctypes.c_void_p) for name in OTHERS),
        ("cache", ctypes.c_void_p * len(ATTENTION_CACHE)),
        ("present", ctypes.c_void_p * len(ATTENTION_CACHE)),
    )


class EvictionProblem(ctypes.Structure):
    """eviction::Problem."""

    _fields_ = (
        *_SIZES,
        ("policy", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("recent", "context", "observe")),
        ("forget", ctypes.c_float),
    )


class EvictionOperands(ctypes.Structure):
    """eviction::Operands."""

    _fields_ = (
        *_CALL,
        ("cache", ctypes.c_void_p * len(EVICTION_CACHE)),
        ("present", ctypes.c_void_p * len(EVICTION_CACHE)),
    )
