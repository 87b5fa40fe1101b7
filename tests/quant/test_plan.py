"""Site plans: which product form follows from the schemes, and massive activations."""

import numpy as np
import pytest

from rotexport.errors import RecipeError
from rotexport.quant.calibrate import InputStatistics
from rotexport.quant.plan import SitePlan, WeightForm, massive_sites_dynamic
from rotexport.quant.scheme import ActivationScheme, WeightScheme


def plan(weights, activations, inputs=64):
    return SitePlan("3.down", "node", inputs, weights, activations)


def dynamic(number_format, group=None):
    return ActivationScheme(number_format, "dynamic", group=group)


@pytest.mark.parametrize(
    ("weights", "activations", "form"),
    [
        (WeightScheme("int8"), ActivationScheme("int8"), WeightForm.PLAIN),
        (WeightScheme("int4", 16), ActivationScheme(), WeightForm.PLAIN),
        (WeightScheme("int4", 64), dynamic("int8"), WeightForm.PLAIN),
        (WeightScheme("int4", 16), dynamic("int8"), WeightForm.TWO_LEVEL),
        (WeightScheme("int4", 16), ActivationScheme("int8"), WeightForm.TWO_LEVEL),
        (WeightScheme("int4", 16, symmetric=False), ActivationScheme(), WeightForm.PLAIN),
        (WeightScheme("int4", symmetric=False), dynamic("int8"), WeightForm.PLAIN),
        (WeightScheme("int4", 16, symmetric=False), dynamic("int8"), WeightForm.TWO_LEVEL),
        (WeightScheme("int4", 16, symmetric=False), dynamic("int4", 16), WeightForm.GROUPED),
        (WeightScheme("int8", 16), dynamic("int8"), WeightForm.GROUPED),
        (WeightScheme("int4", 16), dynamic("int4", 16), WeightForm.GROUPED),
        (WeightScheme("int8"), dynamic("int4", 16), WeightForm.GROUPED),
        (WeightScheme("fp8"), ActivationScheme("fp8"), WeightForm.PLAIN),
        (WeightScheme(), dynamic("int8"), WeightForm.PLAIN),
    ],
)
def test_block_scales_never_meet_quantized_activations_in_plain_form(weights, activations, form):
    assert plan(weights, activations).form is form


@pytest.mark.parametrize(
    ("weights", "activations", "words"),
    [
        (
            WeightScheme("int8", 24),
            ActivationScheme(),
            "weights.group: 24 does not divide the 64 .* site 3.down",
        ),
        (WeightScheme("int8"), dynamic("int8", 24), "activations.group: 24 does not divide"),
        (WeightScheme("int8"), ActivationScheme("fp8"), "int8 weights .* fp8 activations"),
        (WeightScheme("fp8"), dynamic("int8"), "fp8 weights .* int8 activations"),
        (WeightScheme("fp8", 16), ActivationScheme("fp8"), "no group scales"),
        (WeightScheme("int4", 16), dynamic("int8", 32), "16 and activations.group 32 differ"),
        (WeightScheme(), dynamic("int8", 16), "needs quantized weights"),
    ],
)
def test_schemes_that_do_not_go_together_are_refused(weights, activations, words):
    with pytest.raises(RecipeError, match=words):
        plan(weights, activations)


def seen(ratio):
    """Statistics whose largest token is `ratio` times the median."""
    tokens = np.array([1.0, 1.0, ratio], np.float32)
    return InputStatistics(tokens, np.ones(4, np.float32), 3.0, np.ones(4, np.int64))


def model(ratios, sites_per_input=1, mode="static"):
    scheme = (WeightScheme("int8"), ActivationScheme("int8", mode))
    names = [[f"{i}.part{j}" for j in range(sites_per_input)] for i in range(len(ratios))]
    statistics = {}
    for site_names, ratio in zip(names, ratios, strict=True):
        statistics |= dict.fromkeys(site_names, seen(ratio))
    return [SitePlan(name, name, 64, *scheme) for group in names for name in group], statistics


def changed(plan_before, plan_after):
    return [
        after.site
        for before, after in zip(plan_before, plan_after, strict=True)
        if before.activations.mode != after.activations.mode
    ]


def test_a_site_with_massive_activations_becomes_dynamic():
    sites, statistics = model([19.0] * 99 + [237.0])
    result, notes = massive_sites_dynamic(sites, statistics)
    assert changed(sites, result) == ["99.part0"]
    assert result[99].activations == ActivationScheme("int8", "dynamic")
    assert len(notes) == 1
    assert "99.part0: largest token 237 times" in notes[0]


def test_ordinary_sites_stay_static():
    sites, statistics = model([50.0] * 100)  # at the limit, not beyond it
    assert massive_sites_dynamic(sites, statistics) == (sites, [])


def test_only_the_worst_two_percent_change():
    sites, statistics = model([60.0, 90.0, 70.0, 80.0] + [2.0] * 96)
    result, notes = massive_sites_dynamic(sites, statistics)
    assert changed(sites, result) == ["1.part0", "3.part0"]
    assert ["kept static" in note for note in notes] == [False, False, True, True]


def test_sites_that_share_an_input_change_together_or_not_at_all():
    sites, statistics = model([90.0, 70.0] + [2.0] * 38, sites_per_input=3)  # 120 MatMuls: room for 2
    result, notes = massive_sites_dynamic(sites, statistics)
    assert changed(sites, result) == []
    assert all("kept static" in note for note in notes)
    sites, statistics = model([90.0, 70.0] + [2.0] * 48, sites_per_input=3)  # 150 MatMuls: room for 3
    result, _ = massive_sites_dynamic(sites, statistics)
    assert changed(sites, result) == ["0.part0", "0.part1", "0.part2"]


def test_dynamic_sites_need_no_statistics():
    sites, _ = model([237.0], mode="dynamic")
    assert massive_sites_dynamic(sites, {}) == (sites, [])
