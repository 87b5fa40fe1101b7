"""Which recipes which targets run; refusals say what, why, and what would work."""

from dataclasses import replace

import pytest

from rotexport.errors import TargetError
from rotexport.recipe import Override, load_recipe, preset_names
from rotexport.targets.capabilities import check, gpu_name


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_runs_on_ada_and_blackwell_and_in_onnx_runtime(preset):
    assert check("tensorrt-rtx", ["sm89", "SM120"], load_recipe(preset)) == ("sm89", "sm120")
    assert check("onnx", [], load_recipe(preset)) == ()


@pytest.mark.parametrize(
    ("gpus", "preset", "words"),
    [
        (["sm86"], "fp8", "sm86, Ampere .*no native fp8: the hardware has no fp8; the nearest .* 'w8a8'"),
        (["sm89", "sm75"], "quarot-w4a8kv4", "sm75, Turing, has no native int8.*nearest .* 'fp16'"),
        (["sm75"], "w4a16", "no native int4: the builder has no int4; .* 'fp16'"),
    ],
)
def test_a_format_the_gpu_lacks_is_refused_with_the_nearest_preset(gpus, preset, words):
    with pytest.raises(TargetError, match=words):
        check("tensorrt-rtx", gpus, load_recipe(preset))


def test_fp16_runs_everywhere():
    assert check("tensorrt-rtx", ["sm75"], load_recipe("fp16")) == ("sm75",)


def test_an_override_is_checked_too():
    fp8 = load_recipe("fp8")
    recipe = replace(load_recipe("w8a8"), overrides=(Override("head", fp8.weights, fp8.activations),))
    check("tensorrt-rtx", ["sm89"], recipe)
    with pytest.raises(TargetError, match="no native fp8"):
        check("tensorrt-rtx", ["sm86"], recipe)


def test_formats_that_would_be_dequantized_on_every_run_are_refused():
    with pytest.raises(TargetError, match=r"one scale per channel.*set weights\.group to 16"):
        check("tensorrt-rtx", ["sm89"], load_recipe("w4a16", ["weights.group=null"]))
    with pytest.raises(TargetError, match="int8 weights in groups"):
        check("tensorrt-rtx", ["sm89"], load_recipe("w8a16", ["weights.group=64"]))
    check("tensorrt-rtx", ["sm89"], load_recipe("w8a8-dynamic", ["weights.group=64"]))


def test_zero_points_run_in_onnx_runtime_alone_unless_integers_take_them_up():
    for preset in ("quarot-w4a8", "quarot-w4a4kv4"):
        check("tensorrt-rtx", ["sm89"], load_recipe(preset, ["weights.symmetric=false"]))
    recipe = load_recipe("w4a16", ["weights.symmetric=false"])
    check("onnx", [], recipe)
    for target in ("tensorrt-rtx", "tensorrt"):
        with pytest.raises(
            TargetError, match=r"no native zero points.*symmetric to true, or use target onnx"
        ):
            check(target, ["sm89"], recipe)


def test_dtypes():
    bf16 = replace(load_recipe("w8a8"), dtype="bf16")
    check("tensorrt-rtx", ["sm80"], bf16)
    with pytest.raises(TargetError, match="no native bf16"):
        check("tensorrt-rtx", ["sm75"], replace(load_recipe("fp16"), dtype="bf16"))
    with pytest.raises(TargetError, match="no bf16 attention; use --dtype fp32 or fp16"):
        check("onnx", [], bf16)


def test_gpus_the_target_has_no_engines_for_are_refused():
    with pytest.raises(TargetError, match=r"no engines for sm90 \(Hopper\)"):
        check("tensorrt-rtx", ["sm90"], load_recipe("fp16"))
    with pytest.raises(
        TargetError, match=r"needs --gpu, one or more of sm75, sm80, sm86, sm89, sm120, sm121"
    ):
        check("tensorrt-rtx", [], load_recipe("fp16"))
    with pytest.raises(TargetError, match="builds no engines: leave out --gpu sm89"):
        check("onnx", ["sm89"], load_recipe("fp16"))


def test_unknown_names_are_refused():
    with pytest.raises(TargetError, match=r"'sm99' is not a known .* use one of sm75 Turing"):
        gpu_name("sm99")
    with pytest.raises(TargetError, match="'rtx4090'"):
        gpu_name("rtx4090")
    with pytest.raises(TargetError, match="target 'trt' is not one of onnx, tensorrt-rtx, tensorrt"):
        check("trt", [], load_recipe("fp16"))
    assert gpu_name(" SM_89") == "sm89"
