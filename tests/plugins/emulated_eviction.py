"""Calls attention that chooses what stays on the emulator with NumPy arrays."""

from __future__ import annotations

import ctypes

from emulated_attention import EmulatedAttention

POLICIES = {"heavy-hitter": 0, "snapkv": 1}


class Problem(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("policy", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "query_heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_size", "value_size", "sinks", "window")),
        *((name, ctypes.c_int64) for name in ("recent", "context", "observe")),
        *((name, ctypes.c_float) for name in ("forget", "scale", "softcap")),
    )


class EmulatedEviction(EmulatedAttention):
    function = "emulated_eviction"
    cache = ("sink_key", "sink_value", "window_key", "window_value", "window_position", "window_score")
