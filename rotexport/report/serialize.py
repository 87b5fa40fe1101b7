"""Records as JSON and back: frozen dataclasses of plain values, nested.

JSON has no infinities: a float that is not finite becomes null, and is read back as NaN.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Return dataclasses as mappings, sequences as lists, enums by value."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_plain(kind: type[T], data: Any) -> T:
    """Return the value of type `kind` that `to_plain` turned into `data`.

    Raises:
        TypeError, ValueError, KeyError: `data` is not such a value.

    """
    result: T = _read(kind, data)
    return result


def _read(kind: Any, data: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (present,) = (argument for argument in arguments if argument is not type(None))
        return None if data is None else _read(present, data)
    if origin in (list, tuple):
        return origin(_read(arguments[0], inner) for inner in data)
    if origin is dict:
        return {key: _read(arguments[1], inner) for key, inner in data.items()}
    if is_dataclass(kind):
        return _read_record(kind, data)
    return kind(data) if issubclass(kind, Enum) else _read_scalar(kind, data)


def _read_record(kind: Any, data: Any) -> Any:
    hints = get_type_hints(kind)
    return kind(**{item.name: _read(hints[item.name], data[item.name]) for item in fields(kind)})


def _read_scalar(kind: type, data: Any) -> Any:
    if kind is float and (data is None or isinstance(data, int)):
        return math.nan if data is None else float(data)
    if not isinstance(data, kind):
        raise TypeError(f"expected {kind.__name__}, found {data!r}")
    return data
