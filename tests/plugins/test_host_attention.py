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
from fast_hadamard_cases import sylvester

FLOAT, HALF, INT8, INT32, BFLOAT16, INT64 = 0, 1, 2, 3, 7, 8
CODED = [{"bits": bits} | recent for bits in (8, 4, 2) for recent in ({}, {"recent": 3})]
SPECIAL = ({}, {"angles": 24}, {"rotated": True}, {"angles": 24, "rotated": True})
FP8 = {"bits": 8, "fp8": True}
FORMS = [{}, FP8, *(coded | special for coded in CODED for special in SPECIAL)]
INPUTS = ("query", "query_sink", "key", "value", "past_length", "new_length", "decay")
MEANS = ("key_mean", "mean_query", "mean_angles")


def operator(case: Case) -> str:
    endings = {"Centered": case.angles, "Recent": case.recent, "Rotated": case.rotated}
    kept = "".join(ending for ending, asked in endings.items() if asked)
    codes = "Fp8" if case.fp8 else f"Int{case.bits}" if case.bits else ""
    return f"SinkWindowAttention{codes}{kept}"


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
        self.inputs = {"positions": positions} | {name: getattr(call, name) for name in INPUTS}
        self.inputs |= {name: call.others[name] for name in MEANS if case.angles} | call.cache
        if case.rotated:
            tables = {"base": sylvester(1), "hi": sylvester(8), "lo": sylvester(case.head_size // 8)}
            self.inputs |= call.others | tables
        self.output, self.cache = kernels.run(case.problem(2, tokens), call)
        self.request = Request(operator(case), list(self.inputs.values()), fields(case))

    def changed(self, **inputs: np.ndarray) -> Request:
        return replace(self.request, inputs=list((self.inputs | inputs).values()))


def test_creators_and_their_fields(host: Host) -> None:
    listed = {creator[0]: creator[1:] for creator in host.creators()}
    for form in FORMS:
        case = Case(**form)
        types = [f"{name}:{5 if value.dtype == np.int32 else 1}:1" for name, value in fields(case)]
        assert listed[operator(case)] == ["1", "rotexport", "PLUGIN CREATOR_V3ONE", *types]


@pytest.mark.parametrize("aliases", [True, False])
@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_plugin_lives_attends_and_updates_its_cache(
    host: Host, emulated: Path, form: dict[str, int], tokens: int, *, aliases: bool
) -> None:
    """In place, and, where the application did not ask for aliases, in buffers of their own."""
    dtype = np.float16 if aliases else ml_dtypes.bfloat16
    case = Case(repeat=2, group=32 if form else None, decay=0.1, dtype=dtype, **form)
    asked = Asked(emulated, case, tokens)
    output, *cache = host.live(replace(asked.request, aliases=aliases))
    np.testing.assert_array_equal(output, asked.output)
    for name, found in zip(asked.cache, cache, strict=True):
        np.testing.assert_array_equal(found, asked.cache[name], err_msg=name)


@pytest.mark.parametrize("form", FORMS[:10], ids=str)
def test_exactly_the_supported_types_and_formats(host: Host, emulated: Path, form: dict[str, int]) -> None:
    asked = Asked(emulated, Case(**form), 1)
    accepted, other = host.combinations(asked.request)
    cache = [INT8 if tensor.dtype == np.int8 else None for tensor in asked.cache.values()]
    means = [None] * 3 if "angles" in form else []
    rotation = [None, INT8, INT8, INT8] if "rotated" in form else []
    everything = [INT64, *[None] * 4, INT32, INT32, FLOAT, *means, *cache, *rotation, None, *cache]
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
        (
            {"window_key_scale": np.zeros((2, 1, 20, 1, 1), np.float16)},
            "configurePlugin",
            "input 'window_key_scale' has shape [2, 1, 20, 1, 1], must be [2, 1, 20, 1, 2]",
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


@pytest.mark.parametrize(
    ("form", "changed", "complaint"),
    [
        ({"rotated": True}, {"lo": sylvester(4)}, "'hi' and 'lo' are for blocks of 32 channels"),
        ({"rotated": True}, {"base": sylvester(2)}, "input 'base' has shape [2, 2], must be [1, 1]"),
        (
            {"angles": 24},
            {"mean_angles": np.zeros((2, 20, 24), np.float16)},
            "input 'mean_angles' has shape [2, 20, 24], must be [2, 21, 24]",
        ),
        ({"angles": 24}, {"mean_query": np.zeros((2, 2, 1, 8), np.float16)}, "must be [2, 2, 1, 24]"),
    ],
)
def test_rotations_and_means_that_do_not_fit_are_refused(
    host: Host, emulated: Path, form: dict[str, int], changed: dict[str, np.ndarray], complaint: str
) -> None:
    asked = Asked(emulated, Case(repeat=2, bits=4, **form), 1)
    with pytest.raises(HostError, match="configurePlugin: ") as caught:
        host.live(asked.changed(**changed))
    assert complaint in str(caught.value)


def test_a_profile_for_prefill_has_workspace_for_decoding(host: Host, emulated: Path) -> None:
    """Decoding splits a small batch into many parts: the largest call is not the one that needs most."""
    asked = Asked(emulated, Case(), 1)
    largest = [array.shape for array in asked.request.inputs]
    largest[0] = (2, 17)
    largest[1:5] = [(*shape[:2], 17, shape[3]) for shape in largest[1:5]]
    output, *_ = host.live(replace(asked.request, largest=largest))
    np.testing.assert_array_equal(output, asked.output)
