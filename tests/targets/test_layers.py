"""Layer lists: reading a builder's log, telling kernels apart, catching silent fallbacks."""

import pytest

from rotexport.errors import TargetError
from rotexport.targets.layers import Kernel, assert_kernels, expected_kernel, kernels, parse_layers


def operand(dtype, *shape):
    dims = ",".join(map(str, shape))
    return f"{{ Name: t, Dimensions: [{dims}], Strides: [1], StrideOrder: [0], Datatype: {dtype}, Format: (Linear) }}"


def layer(name, kind, inputs, constants, origins):
    lists = [f"[ {', '.join(operands)}]" if operands else "[]" for operands in (inputs, constants)]
    nodes = "".join(f"[ONNX Layer: {origin}]" for origin in origins)
    outputs = f"[ {operand('Half', -1, 8)}]"
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: {lists[0]}, Constants: {lists[1]}, Outputs: {outputs}, "
        f"TacticName: stub, StreamId: 0, Metadata: {nodes}"
    )


ALPHA = operand("Float", 1)
LOG = "\n".join(
    [
        "    Layers:",
        "Name: shapes, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: ",
        layer(
            "k+q", "gemm", [operand("Int8", -1, 16)], [operand("Int8", 16, 8), ALPHA, ALPHA], ["q", "k", "dq"]
        ),
        layer("scale", "kgen", [operand("Float", -1, 8)], [operand("Float", 1, 8)], ["q", "dq"]),
        layer(
            "MulFc",
            "runtime_fusion",
            [operand("Half", -1, 16)],
            [operand("Int4", 16, 8), operand("Half", 2, 8)],
            ["up"],
        ),
        layer(
            "FcAdd",
            "runtime_fusion",
            [operand("Half", -1, 16)],
            [operand("Half", 16, 8)],
            ["down", "residual"],
        ),
        layer("head", "gemm", [operand("FP8", -1, 16)], [operand("FP8", 16, 8), ALPHA, ALPHA], ["head"]),
        "",
        "I/O Tensors:",
        " Name: x, IOMode: Input, DataType: Half, Dimensions: [-1,16], Location: Device",
    ]
)


def test_every_layer_is_read_with_its_operands_and_origins():
    layers = parse_layers(LOG)
    assert [one.kind for one in layers] == [
        "shape_call",
        "gemm",
        "kgen",
        "runtime_fusion",
        "runtime_fusion",
        "gemm",
    ]
    merged = layers[1]
    assert merged.origins == ("q", "k", "dq")
    assert [(o.dtype, o.shape) for o in merged.inputs + merged.constants][:2] == [
        ("Int8", (-1, 16)),
        ("Int8", (16, 8)),
    ]


def test_kernels_are_told_by_what_is_multiplied():
    assert kernels(parse_layers(LOG)) == {
        "q": {Kernel.INT8},
        "k": {Kernel.INT8},
        "dq": {Kernel.INT8},
        "up": {Kernel.INT4_WEIGHTS},
        "down": {Kernel.FP16},
        "residual": {Kernel.FP16},
        "head": {Kernel.FP8},
    }


def test_a_fallback_names_its_sites_and_right_kernels_pass():
    layers = parse_layers(LOG)
    right = {"q": Kernel.INT8, "k": Kernel.INT8, "up": Kernel.INT4_WEIGHTS, "down": Kernel.FP16}
    assert_kernels(layers, right, "engine")
    with pytest.raises(
        TargetError, match=r"engine: 2 of 5 .*\n  down: fp16 gemm, not int8 gemm\n  gone: no matrix"
    ):
        assert_kernels(layers, right | {"down": Kernel.INT8, "gone": Kernel.INT8}, "engine")


def test_one_right_kernel_does_not_hide_a_wrong_one():
    twice = LOG + "\n" + layer("k2", "gemm", [operand("Half", -1, 16)], [operand("Half", 16, 8)], ["k"])
    with pytest.raises(TargetError, match="k: fp16 gemm and int8 gemm, not int8 gemm"):
        assert_kernels(parse_layers(twice), {"k": Kernel.INT8, "q": Kernel.INT8}, "engine")


def test_plugins_are_kernels_of_ours():
    log = layer("down", "PluginV3", [operand("Int8", -1, 16)], [operand("Int8", 8, 16)], ["down"])
    assert kernels(parse_layers(log)) == {"down": {Kernel.PLUGIN}}


def test_a_log_without_layers_is_an_error():
    with pytest.raises(TargetError, match="lists no layers"):
        parse_layers("Engine generation completed")


@pytest.mark.parametrize(
    ("weights", "activations", "kernel"),
    [
        ("none", "none", Kernel.FP16),
        ("int4", "none", Kernel.INT4_WEIGHTS),
        ("int8", "int8", Kernel.INT8),
        ("int4", "int8", Kernel.INT8),
        ("int4", "int4", Kernel.INT8),
        ("fp8", "fp8", Kernel.FP8),
    ],
)
def test_what_formats_ask_for(weights, activations, kernel):
    assert expected_kernel(weights, activations, "fp16") is kernel
