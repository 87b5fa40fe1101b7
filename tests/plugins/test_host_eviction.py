"""The plugins that choose what stays, driven through their IPluginV3 interfaces on the emulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from driver import Host, HostError, Request
from emulated_eviction import EmulatedEviction
from eviction_cases import HEAVY, POLICIES, SNAP, EvictingCase, session_of

from rotexport.streaming.cache import FLOAT_CACHE, LayerCache
from rotexport.streaming.eviction import OPERATORS, Eviction

FLOAT, HALF, INT32, BFLOAT16, INT64 = 0, 1, 3, 7, 8
INPUTS = ("query", "query_sink", "key", "value", "past_length", "new_length", "decay")


def fields(case: EvictingCase) -> dict[str, np.ndarray]:
    numbers = {"sinks": case.sinks, "window": case.window, "query_heads": case.query_heads}
    numbers |= {"kv_heads": case.kv_heads, "head_size": case.head_size, "value_size": case.value_size}
    every = numbers | {"scale": case.scale, "softcap": case.softcap} | case.policy.attributes
    return {
        name: np.array([value], np.int32 if isinstance(value, int) else np.float32)
        for name, value in every.items()
    }


class Asked:
    """A call over a cache that is full, and what the kernels make of it."""

    def __init__(self, emulated: Path, case: EvictingCase, tokens: int) -> None:
        kernels = EmulatedEviction(emulated / "librotexport_emulated_kernels.so")
        session = session_of(kernels, case, [70, 70])
        session.call([30, 5])
        call = session.next_call([tokens, 1], tokens, 0.0)
        positions = call.past_length[:, None] + np.arange(tokens, dtype=np.int64)
        sizes = (case.kv_heads, case.head_size, case.value_size, case.sinks, case.window)
        names = LayerCache(*sizes, FLOAT_CACHE, case.type, case.policy).tensors()
        cache = dict(zip(names, call.cache.values(), strict=True))
        self.inputs = {"positions": positions} | {name: getattr(call, name) for name in INPUTS} | cache
        output, updated = kernels.run(case.problem(2, tokens), call)
        self.outputs = [output, *updated.values()]
        self.request = Request(
            OPERATORS[case.policy.policy], list(self.inputs.values()), list(fields(case).items())
        )

    def changed(self, **inputs: np.ndarray) -> Request:
        return replace(self.request, inputs=list((self.inputs | inputs).values()))


@pytest.mark.parametrize("policy", POLICIES)
def test_creators_and_their_fields(host: Host, policy: Eviction) -> None:
    listed = {creator[0]: creator[1:] for creator in host.creators()}
    name, version, namespace = OPERATORS[policy.policy], "1", "rotexport"
    types = {
        f"{n}:{5 if v.dtype == np.int32 else 1}:1" for n, v in fields(EvictingCase(policy=policy)).items()
    }
    assert listed[name][:3] == [version, namespace, "PLUGIN CREATOR_V3ONE"]
    assert set(listed[name][3:]) == types


@pytest.mark.parametrize("aliases", [True, False])
@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_plugin_lives_attends_and_updates_its_cache(
    host: Host, emulated: Path, policy: Eviction, tokens: int, *, aliases: bool
) -> None:
    """In place, and, where the application did not ask for aliases, in buffers of their own."""
    dtype = np.float16 if aliases else ml_dtypes.bfloat16
    asked = Asked(emulated, EvictingCase(repeat=2, decay=0.1, dtype=dtype, policy=policy), tokens)
    found = host.live(replace(asked.request, aliases=aliases))
    for one, expected in zip(found, asked.outputs, strict=True):
        np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_exactly_the_supported_types_and_formats(host: Host, emulated: Path, policy: Eviction) -> None:
    accepted, other = host.combinations(Asked(emulated, EvictingCase(policy=policy), 1).request)
    cache = [None] * 4 + [INT32, FLOAT]
    everything = [INT64, *[None] * 4, INT32, INT32, FLOAT, *cache, None, *cache]
    expected = {tuple(t if e is None else e for e in everything) for t in (HALF, BFLOAT16)}
    assert (accepted, other) == (expected, 0)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("forget", None, "field 'forget' is missing"),
        ("observe", np.int32([2]), "observe"),
        ("context", np.float32([20]), "field 'context'"),
    ],
)
def test_creators_refuse_bad_fields(
    host: Host, emulated: Path, name: str, value: np.ndarray | None, complaint: str
) -> None:
    asked = Asked(emulated, EvictingCase(policy=HEAVY), 1).request
    kept = [field for field in asked.fields if field[0] != name]
    with pytest.raises(HostError, match="createPlugin: logged rotexport: HeavyHitterAttention: ") as caught:
        host.live(replace(asked, fields=kept if value is None else [*kept, (name, value)]))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "step", "complaint"),
    [
        ({"decay": np.zeros(3, np.float32)}, "configurePlugin", "input 'decay' has shape [3], must be [2]"),
        (
            {"window_score": np.zeros((2, 1, 21), np.float32)},
            "configurePlugin",
            "input 'window_score' has shape [2, 1, 21], must be [2, 1, 20]",
        ),
        ({"key": np.zeros((2, 64), np.float16)}, "getOutputShapes", "input 'key' has 2 axes, must have 4"),
        ({"query": np.zeros((2, 2, 1, 64), np.float32)}, "getOutputDataTypes", "must be float16 or bfloat16"),
        (
            {"window_position": np.zeros((2, 1, 20), np.int64)},
            "supportsFormatCombination refuses tensor 12",
            "",
        ),
    ],
)
def test_bad_inputs_are_refused_before_anything_runs(
    host: Host, emulated: Path, changed: dict[str, np.ndarray], step: str, complaint: str
) -> None:
    asked = Asked(emulated, EvictingCase(repeat=2, policy=HEAVY), 1)
    with pytest.raises(HostError) as caught:
        host.live(asked.changed(**changed))
    assert str(caught.value).startswith(step) and complaint in str(caught.value)


def test_numbers_no_kernel_takes_are_refused(host: Host, emulated: Path) -> None:
    asked = Asked(emulated, EvictingCase(policy=SNAP), 1).request
    wrong = [(name, np.int32([0]) if name == "observe" else value) for name, value in asked.fields]
    with pytest.raises(HostError, match="SnapAttention: observe is 0, must be positive"):
        host.live(replace(asked, fields=wrong))


def test_a_profile_for_prompts_has_workspace_for_single_tokens(host: Host, emulated: Path) -> None:
    asked = Asked(emulated, EvictingCase(policy=HEAVY), 1)
    largest = [array.shape for array in asked.request.inputs]
    largest[0] = (2, 100)
    largest[1:5] = [(*shape[:2], 100, shape[3]) for shape in largest[1:5]]
    found = host.live(replace(asked.request, largest=largest))
    np.testing.assert_array_equal(found[0], asked.outputs[0])
