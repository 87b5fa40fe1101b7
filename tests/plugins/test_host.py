"""The plugin library, driven through its IPluginV3 interfaces on the emulator: the real enqueue, no TensorRT."""

from __future__ import annotations

import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from driver import Host, HostError, Request
from fast_hadamard_cases import LARGEST_CODE, Case, sylvester, unpack_nibbles
from symbols import assert_loadable_without_tensorrt

FLOAT, HALF, INT8, BFLOAT16 = 0, 1, 2, 7
CASE = Case(12, 16, rows=6, blocks=2)
CLIP = [("clip", np.float32([0.9]))]


def request(
    plugin: str,
    case: Case = CASE,
    dtype: type = np.float16,
    fields: list[tuple[str, np.ndarray]] | None = None,
    **changed: np.ndarray,
) -> Request:
    """Return a request for x of shape [2, rows / 2, width], some inputs changed."""
    x, signs = case.inputs(np.dtype(dtype))
    high = 2 ** (case.power.bit_length() // 2)
    inputs = {
        "x": x.reshape(2, -1, case.width),
        "signs": signs,
        "base": case.matrix().copy(),
        "hi": sylvester(high),
        "lo": sylvester(case.power // high),
    }
    inputs.update(changed)
    default = [] if plugin == "FastHadamard" else CLIP
    return Request(plugin, list(inputs.values()), default if fields is None else fields)


def test_creators_and_their_fields(host: Host) -> None:
    common = ["1", "rotexport", "PLUGIN CREATOR_V3ONE"]
    listed = [creator for creator in host.creators() if creator[0].startswith("FastHadamard")]
    assert listed == [
        ["FastHadamard", *common],
        ["FastHadamardInt8", *common, "clip:1:1"],
        ["FastHadamardInt4", *common, "clip:1:1"],
    ]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_a_plugin_lives_and_transforms(host: Host, dtype: type) -> None:
    asked = request("FastHadamard", dtype=dtype)
    (y,) = host.live(asked)
    assert y.shape == asked.inputs[0].shape and y.dtype == dtype
    exact = CASE.reference(asked.inputs[0].reshape(6, -1), asked.inputs[1])
    epsilon = {2: 2.0**-8, 4: 1e-6}[np.dtype(dtype).itemsize]
    np.testing.assert_allclose(y.astype(np.float64).reshape(6, -1), exact, atol=epsilon * np.abs(exact).max())


@pytest.mark.parametrize("output", ["int8", "int4"])
def test_quantizing_plugins_use_the_clip_that_was_serialized(host: Host, output: str) -> None:
    asked = request(f"FastHadamardI{output[1:]}")
    codes, scale = host.live(asked)
    width = CASE.width if output == "int8" else CASE.width // 2
    assert codes.shape == (2, 3, width) and codes.dtype == np.int8
    assert scale.shape == (2, 3, 1) and scale.dtype == np.float32
    exact = CASE.reference(asked.inputs[0].reshape(6, -1), asked.inputs[1])
    peak = np.abs(exact).max(axis=1, keepdims=True)
    np.testing.assert_allclose(scale.reshape(6, 1), peak * 0.9 / LARGEST_CODE[output], rtol=1e-5)
    codes = unpack_nibbles(codes.reshape(6, -1)) if output == "int4" else codes.reshape(6, -1)
    largest = LARGEST_CODE[output]
    quotient = np.clip(exact / scale.reshape(6, 1), -largest - 1, largest)
    assert np.abs(codes - quotient).max() <= 0.5 + 1e-3


def test_a_wide_base_uses_the_workspace(host: Host) -> None:
    case = Case(28, 8, rows=4)
    asked = request("FastHadamard", case, np.float32)
    (y,) = host.live(asked)
    exact = case.reference(asked.inputs[0].reshape(4, -1), asked.inputs[1])
    np.testing.assert_allclose(y.reshape(4, -1), exact, atol=1e-5 * np.abs(exact).max())


def test_exactly_the_supported_types_and_formats(host: Host) -> None:
    tables = [INT8, INT8, INT8]
    plain, other = host.combinations(request("FastHadamard"))
    assert plain == {(t, t, *tables, t) for t in (FLOAT, HALF, BFLOAT16)}
    assert other == 0
    for name in ("FastHadamardInt8", "FastHadamardInt4"):
        quantizing, other = host.combinations(request(name))
        assert quantizing == {(t, t, *tables, INT8, FLOAT) for t in (FLOAT, HALF, BFLOAT16)}
        assert other == 0


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ([], "field 'clip' is missing"),
        ([("clip", np.int32([1]))], "field 'clip' is of type int32, must be float32"),
        ([("clip", np.float32([0.9, 0.9]))], "field 'clip' has 2 values, must have one"),
        ([("clip", np.float32([1.5]))], "field 'clip' is 1.500000, must lie in (0, 1]"),
        ([("clip", np.float32([np.nan]))], "field 'clip' is nan"),
        ([*CLIP, ("group", np.int32([64]))], "unknown field 'group'"),
        ([*CLIP, *CLIP], "field 'clip' is given twice"),
    ],
)
def test_creators_refuse_bad_fields(host: Host, fields: list[tuple[str, np.ndarray]], complaint: str) -> None:
    with pytest.raises(HostError) as caught:
        host.live(request("FastHadamardInt8", fields=fields))
    assert str(caught.value).startswith("createPlugin: logged rotexport: FastHadamardInt8: ")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "step", "complaint"),
    [
        ({"x": np.zeros((2, 3, 100), np.float16)}, "getOutputShapes", "must be [100]"),
        (
            {"signs": np.zeros(96, np.float16)},
            "getOutputShapes",
            "input 'signs' has shape [96], must be [384]",
        ),
        ({"base": np.ones((12, 11), np.int8)}, "getOutputShapes", "input 'base' has shape [12, 11]"),
        (
            {"lo": np.ones((3, 3), np.int8)},
            "getOutputShapes",
            "12 of the Sylvester factors is no power of two",
        ),
        (
            {"hi": np.ones((64, 64), np.int8)},
            "getOutputShapes",
            "384 elements, no multiple of the length 3072",
        ),
        ({"signs": np.zeros(384, np.float32)}, "supportsFormatCombination refuses tensor 1", ""),
        ({"base": np.ones((12, 12), np.int32)}, "supportsFormatCombination refuses tensor 2", ""),
        ({"x": np.zeros((2, 384), np.int32)}, "getOutputDataTypes", "must be float16, bfloat16 or float32"),
    ],
)
def test_bad_inputs_are_refused_before_anything_runs(
    host: Host, changed: dict[str, np.ndarray], step: str, complaint: str
) -> None:
    with pytest.raises(HostError) as caught:
        host.live(request("FastHadamard", **changed))
    message = str(caught.value)
    assert message.startswith(step) and complaint in message
    if complaint:
        assert "recorded rotexport: FastHadamard: " in message


def test_a_profile_beyond_what_the_kernel_takes_is_refused(host: Host) -> None:
    asked = request("FastHadamard")
    largest = [array.shape for array in asked.inputs]
    largest[0] = (2**30, 2**20, 384)
    with pytest.raises(HostError, match=r"configurePlugin: recorded rotexport: .* are above 2\^40"):
        host.live(Request(asked.plugin, asked.inputs, [], largest))


def test_inputs_are_not_read_past_their_end(host: Host) -> None:
    """The host binds exactly the bytes it has: a plugin that trusts another shape would be reported."""
    asked = request("FastHadamard")
    short = asked.inputs[0].reshape(-1)[: CASE.width * 5].reshape(1, 5, CASE.width).copy()
    (y,) = host.live(Request("FastHadamard", [short, *asked.inputs[1:]], []))
    assert y.shape == (1, 5, CASE.width)


def test_contexts_run_side_by_side(host: Host) -> None:
    asked = [request("FastHadamardInt8", Case(1, 64 << i, rows=4)) for i in range(4)]
    alone = [host.live(one) for one in asked]
    together: list[list[np.ndarray]] = [[] for _ in asked]

    def run(i: int) -> None:
        together[i] = host.live(asked[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        for expected, got in zip(one, other, strict=True):
            np.testing.assert_array_equal(expected, got)


def test_the_library_exports_three_symbols_and_needs_no_tensorrt(host: Host, emulated: Path) -> None:
    assert_loadable_without_tensorrt(next(emulated.glob("librotexport_plugins_trt*.so")))
