"""The sink/window plugins, driven through their IPluginV3 interfaces on the emulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from attention_cases import Case, Session, Stream
from driver import Host, HostError, Request
from emulated_attention import EmulatedAttention

FLOAT, HALF, INT8, INT32, BFLOAT16, INT64 = 0, 1, 2, 3, 7, 8
FORMATS = [(None, 0), (8, 0), (4, 0), (2, 0), (8, 3), (4, 3), (2, 3)]  # bits, recent
INPUTS = ("query", "query_sink", "key", "value", "past_length", "new_length", "decay")


def operator(case: Case) -> str:
    return (
        "SinkWindowAttention" + (f"Int{case.bits}" if case.bits else "") + ("Recent" if case.recent else "")
    )


def fields(case: Case) -> list[tuple[str, np.ndarray]]:
    numbers = {"sinks": case.sinks, "window": case.window} | ({"recent": case.recent} if case.recent else {})
    numbers |= {"query_heads": case.query_heads, "kv_heads": case.kv_heads}
    numbers |= {"head_size": case.head_size, "value_size": case.value_size}
    factors = {"scale": case.scale, "softcap": case.softcap}
    return [(name, np.int32([value])) for name, value in numbers.items()] + [
        (name, np.float32([value])) for name, value in factors.items()
    ]


class Asked:
    """A call over a cache that has turned once, and what the kernels make of it."""

    def __init__(self, emulated: Path, case: Case, tokens: int) -> None:
        kernels = EmulatedAttention(emulated / "librotexport_emulated_kernels.so")
        session = Session(kernels, case, [Stream(case, 70, np.random.default_rng(row)) for row in range(2)])
        session.call([30, 5])
        call = session.next_call([tokens, 1], tokens, 0.0)
        positions = call.past_length[:, None] + np.arange(tokens, dtype=np.int64)
        self.inputs = {"positions": positions} | {name: getattr(call, name) for name in INPUTS} | call.cache
        self.output, self.cache = kernels.run(case.problem(2, tokens), call)
        self.request = Request(operator(case), list(self.inputs.values()), fields(case))

    def changed(self, **inputs: np.ndarray) -> Request:
        return replace(self.request, inputs=list((self.inputs | inputs).values()))


def test_creators_and_their_fields(host: Host) -> None:
    listed = {creator[0]: creator[1:] for creator in host.creators()}
    for bits, recent in FORMATS:
        case = Case(bits=bits, recent=recent)
        types = [f"{name}:{5 if value.dtype == np.int32 else 1}:1" for name, value in fields(case)]
        assert listed[operator(case)] == ["1", "rotexport", "PLUGIN CREATOR_V3ONE", *types]


@pytest.mark.parametrize("aliases", [True, False])
@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize(("bits", "recent"), FORMATS)
def test_a_plugin_lives_attends_and_updates_its_cache(
    host: Host, emulated: Path, bits: int | None, recent: int, tokens: int, *, aliases: bool
) -> None:
    """In place, and, where the application did not ask for aliases, in buffers of their own."""
    dtype = np.float16 if aliases else ml_dtypes.bfloat16
    case = Case(repeat=2, bits=bits, recent=recent, group=32 if bits else None, decay=0.1, dtype=dtype)
    asked = Asked(emulated, case, tokens)
    output, *cache = host.live(replace(asked.request, aliases=aliases))
    np.testing.assert_array_equal(output, asked.output)
    for name, found in zip(asked.inputs, [None] * 8 + cache, strict=True):
        if found is not None:
            np.testing.assert_array_equal(found, asked.cache[name], err_msg=name)


@pytest.mark.parametrize(("bits", "recent"), FORMATS[:5])
def test_exactly_the_supported_types_and_formats(
    host: Host, emulated: Path, bits: int | None, recent: int
) -> None:
    asked = Asked(emulated, Case(bits=bits, recent=recent), 1)
    accepted, other = host.combinations(asked.request)
    ring, scales = ([INT8] * 2, True) if bits else ([None] * 2, False)
    cache = [None, None, *ring, *([None] * 2 if scales else []), *([None] * 2 if recent else [])]
    everything = [INT64, *[None] * 4, INT32, INT32, FLOAT, *cache, None, *cache]
    expected = {tuple(t if e is None else e for e in everything) for t in (HALF, BFLOAT16)}
    assert (accepted, other) == (expected, 0)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("window", None, "field 'window' is missing"),
        ("window", np.float32([20]), "field 'window'"),
        ("recent", np.int32([2]), "recent"),
        ("colour", np.int32([2]), "colour"),
    ],
)
def test_creators_refuse_bad_fields(
    host: Host, emulated: Path, name: str, value: np.ndarray | None, complaint: str
) -> None:
    asked = Asked(emulated, Case(), 1).request
    kept = [field for field in asked.fields if field[0] != name]
    with pytest.raises(HostError, match="createPlugin: logged rotexport: SinkWindowAttention: ") as caught:
        host.live(replace(asked, fields=kept if value is None else [*kept, (name, value)]))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "step", "complaint"),
    [
        ({"decay": np.zeros(3, np.float32)}, "configurePlugin", "input 'decay' has shape [3], must be [2]"),
        (
            {"window_key": np.zeros((2, 1, 20, 64), np.int8)},
            "configurePlugin",
            "input 'window_key' has shape [2, 1, 20, 64], must be [2, 1, 20, 32]",
        ),
        ({"key": np.zeros((2, 64), np.float16)}, "getOutputShapes", "input 'key' has 2 axes, must have 4"),
        ({"query": np.zeros((2, 2, 1, 64), np.float32)}, "getOutputDataTypes", "must be float16 or bfloat16"),
        ({"past_length": np.zeros(2, np.int64)}, "supportsFormatCombination refuses tensor 5", ""),
    ],
)
def test_bad_inputs_are_refused_before_anything_runs(
    host: Host, emulated: Path, changed: dict[str, np.ndarray], step: str, complaint: str
) -> None:
    asked = Asked(emulated, Case(repeat=2, bits=4), 1)
    with pytest.raises(HostError) as caught:
        host.live(asked.changed(**changed))
    assert str(caught.value).startswith(step) and complaint in str(caught.value)


def test_a_profile_for_prefill_has_workspace_for_decoding(host: Host, emulated: Path) -> None:
    """Decoding splits a small batch into many parts: the largest call is not the one that needs most."""
    asked = Asked(emulated, Case(), 1)
    largest = [array.shape for array in asked.request.inputs]
    largest[0] = (2, 17)
    largest[1:5] = [(*shape[:2], 17, shape[3]) for shape in largest[1:5]]
    output, *_ = host.live(replace(asked.request, largest=largest))
    np.testing.assert_array_equal(output, asked.output)
