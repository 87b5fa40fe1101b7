"""Calls C functions whose last arguments are room for a message, and which return whether they failed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

CAPACITY = 1024


def call(function: Callable[..., int], *arguments: object, error: type[Exception] = RuntimeError) -> None:
    """Call a function.

    Raises:
        error: it failed, and said why.

    """
    message = ctypes.create_string_buffer(CAPACITY)
    if function(*arguments, message, ctypes.c_size_t(CAPACITY)):
        raise error(message.value.decode())
