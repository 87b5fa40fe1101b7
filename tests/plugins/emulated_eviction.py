"""Calls attention that chooses what stays on the emulator with NumPy arrays."""

from __future__ import annotations

from emulated_attention import EmulatedAttention
from structures import EVICTION_CACHE, EvictionOperands


class EmulatedEviction(EmulatedAttention):
    function = "emulated_eviction"
    cache = EVICTION_CACHE
    operands = EvictionOperands
