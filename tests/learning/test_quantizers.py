"""Learned quantizers compute what the exported graph computes; weights bit for bit."""

import numpy as np
import pytest
import torch

from rotexport.blocks.fake_quant import CacheQuantizer, DynamicQuantizer
from rotexport.learning.quantizers import ActivationQuantizer, LearnedWeight, StraightThrough, WeightGrid
from rotexport.quant.formats import weight_format
from rotexport.quant.scales import AsymmetricRounding, QuantizedTensor, ScaledRounding
from rotexport.quant.scheme import ActivationScheme

K, N = 48, 10


def matrix(seed: int = 0) -> torch.Tensor:
    return torch.randn(K, N, generator=torch.Generator().manual_seed(seed)) * 0.1


def learned(
    form: str, group: int, two_level: bool = False, scale_type: torch.dtype = torch.float32
) -> LearnedWeight:
    start = ScaledRounding(weight_format(form), group, search=True, two_level=two_level).quantize(
        matrix().numpy()
    )
    return LearnedWeight(matrix(), start, WeightGrid(weight_format(form), group, scale_type))


def shaken(weight: LearnedWeight) -> LearnedWeight:
    """Move every parameter, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in weight.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return weight


def dequantized(tensor: QuantizedTensor) -> np.ndarray:
    """What DequantizeLinear makes of the stored parts: integers first, then one float32 product."""
    codes = tensor.codes.astype(np.float32)
    if tensor.factors is not None:
        codes = codes * np.repeat(tensor.factors, K // len(tensor.factors), axis=0)
    return codes * np.repeat(tensor.scales, K // len(tensor.scales), axis=0)


FORMS = [
    ("int4", 16, False),
    ("int4", 16, True),
    ("int4", 48, False),
    ("int8", 48, False),
    ("int8", 12, False),
]


@pytest.mark.parametrize(("form", "group", "two_level"), FORMS)
def test_starts_at_the_codes_it_is_given(form: str, group: int, two_level: bool) -> None:
    start = ScaledRounding(weight_format(form), group, search=True, two_level=two_level).quantize(
        matrix().numpy()
    )
    moved = QuantizedTensor(np.roll(start.codes, 1, axis=0), start.scales, start.factors)  # far from rounding
    weight = LearnedWeight(matrix(), moved, WeightGrid(weight_format(form), group))
    np.testing.assert_array_equal(weight.export().codes, moved.codes)
    np.testing.assert_array_equal(weight().detach(), dequantized(moved))


@pytest.mark.parametrize(("form", "group", "two_level"), FORMS)
def test_export_reproduces_the_trained_forward_bit_for_bit(form: str, group: int, two_level: bool) -> None:
    weight = shaken(learned(form, group, two_level))
    exported = weight.export()
    np.testing.assert_array_equal(dequantized(exported), weight().detach())
    assert exported.codes.astype(np.float32).min() >= weight.grid.format.lowest
    assert exported.codes.astype(np.float32).max() <= weight.grid.format.highest
    if exported.factors is not None:
        assert set(np.unique(exported.factors)) <= set(range(1, 16))


@pytest.mark.parametrize(
    ("form", "group", "two_level"),
    [("int4", 16, False), ("int4", 16, True), ("int4", 48, False), ("int8", 12, False)],
)
def test_zero_points_stay_while_numbers_and_scales_learn(form: str, group: int, two_level: bool) -> None:
    number_format = weight_format(form, symmetric=False)
    leaning = matrix() + 0.1
    start = AsymmetricRounding(number_format, group, True, two_level).quantize(leaning.numpy())
    weight = LearnedWeight(leaning, start, WeightGrid(number_format, group))
    np.testing.assert_array_equal(weight.export().codes, start.codes)
    exported = shaken(weight).export()
    assert (exported.codes.astype(int) != start.codes.astype(int)).any()
    np.testing.assert_array_equal(exported.zeros, start.zeros)
    steps = exported.codes.astype(np.float32) - np.repeat(exported.zeros.astype(np.float32), group, axis=0)
    if two_level:
        steps *= np.repeat(exported.factors, group, axis=0)
        assert np.abs(steps).max() <= 127
    scales = np.repeat(exported.scales, len(steps) // len(exported.scales), axis=0)
    np.testing.assert_array_equal(steps * scales, weight().detach())
    weight.project()  # numbers outside the range of codes come back to its ends
    np.testing.assert_array_equal(weight.export().codes, exported.codes)


def test_scales_that_are_kept_in_fp16_are_trained_in_fp16() -> None:
    scales = shaken(learned("int4", 16, scale_type=torch.float16)).export().scales
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    finer = shaken(learned("int4", 16)).export().scales
    assert (finer != finer.astype(np.float16)).any()


def test_training_a_weight_towards_another_reaches_it() -> None:
    target = matrix(seed=5)
    weight = learned("int4", 16)
    optimizer = torch.optim.Adam(
        [{"params": [weight.numbers], "lr": 0.1}, {"params": [weight.channel], "lr": 0.02}]
    )
    errors = []
    for _ in range(200):
        loss = ((weight() - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        weight.project()
        errors.append(loss.item())
    best = ScaledRounding(weight_format("int4"), 16, search=True).quantize(target.numpy())
    rounding = float(((torch.from_numpy(dequantized(best)) - target) ** 2).mean())
    assert rounding < errors[-1] < 0.03 * errors[0]  # straight-through steps hover about the optimum


@pytest.mark.parametrize(("form", "group"), [("int8", 48), ("int4", 48), ("int4", 16)])
def test_activations_are_quantized_as_the_graph_does(form: str, group: int) -> None:
    highest = {"int8": 127, "int4": 7}[form]
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2))
    x[0, 0] = 0  # a row of zeros stays zero
    quantizer = ActivationQuantizer(ActivationScheme(form, "dynamic", clip=0.9), group, learn_clip=True)
    rows = x.double().numpy().reshape(3, 5, -1, group)
    scale = np.maximum(np.abs(rows).max(-1, keepdims=True) * 0.9 / highest, 1e-10)
    lowest = -128 if form == "int8" else -7
    expected = (np.clip(np.rint(rows / scale), lowest, highest) * scale).reshape(x.shape)
    difference = np.abs(quantizer(x).detach().numpy() - expected)
    # A value that float32 puts on the other side of a tie may differ by a step: none does with this seed.
    assert difference.max() < 1e-6 * np.abs(expected).max()


def test_asymmetric_activations_are_quantized_as_in_calibration() -> None:
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2)).abs() - 0.3
    scheme = ActivationScheme("int4", "dynamic", clip=0.9, symmetric=False)
    quantizer = ActivationQuantizer(scheme, 16, learn_clip=False)
    rows = x.double().numpy().reshape(3, 5, -1, 16)
    least = np.minimum(rows.min(-1, keepdims=True), 0)
    scale = (np.maximum(rows.max(-1, keepdims=True), 0) - least) * 0.9 / 15
    lowest = np.rint(least * 0.9 / scale)
    expected = (np.clip(np.rint(rows / scale), lowest, lowest + 15) * scale).reshape(x.shape)
    assert np.abs(quantizer(x).numpy() - expected).max() < 1e-6 * np.abs(expected).max()
    assert torch.equal(quantizer(x), DynamicQuantizer(quantizer.format, 0.9, 16)(x))


def test_clip_learns_to_cut_a_lone_outlier() -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
    x[:, 0] = 8.0
    quantizer = ActivationQuantizer(ActivationScheme("int4", "dynamic"), 16, learn_clip=True)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    first = quantizer.clip.item()
    for _ in range(100):
        optimizer.zero_grad()
        ((quantizer(x) - x)[:, 1:] ** 2).mean().backward()
        optimizer.step()
    assert 0 < quantizer.clip.item() < 0.6 < first < 1


def test_a_quantizer_without_parameters_passes_gradients_straight_through() -> None:
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(4)).requires_grad_()
    quantizer = CacheQuantizer("int4", group=4, clip=1.0)
    read = StraightThrough(quantizer)(x)
    torch.testing.assert_close(read, quantizer(x.detach()))
    read.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
