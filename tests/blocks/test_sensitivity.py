"""Which weights stay wider: those that hurt most per byte, while the budget lasts."""

from __future__ import annotations

import numpy as np
import pytest
from support.tiny import tiny_model

from rotexport.blocks.calibration import Network
from rotexport.blocks.sensitivity import Sensitivity, sensitivities, weight_bytes, widen
from rotexport.checkpoint import open_checkpoint
from rotexport.errors import RecipeError
from rotexport.export import export
from rotexport.pipeline import plan_sites
from rotexport.quant.plan import SitePlan
from rotexport.quant.scheme import ActivationScheme, MixedScheme, WeightScheme
from rotexport.recipe import from_mapping

INT8 = MixedScheme("int8", 1.3)


def site(name: str, inputs: int = 64) -> SitePlan:
    return SitePlan(name, name, inputs, WeightScheme("int4", 32), ActivationScheme("int8", "dynamic"))


def test_the_budget_goes_to_the_largest_gain_per_byte() -> None:
    plan = [site("0.gate"), site("0.down"), site("1.gate"), site("1.down")]
    outputs = {planned.site: 10 for planned in plan}
    # 64 inputs in int4 with two scales: 40 bytes per channel; in int8 with one, 68.
    assert weight_bytes(plan[0], 10) == 400
    found = [
        Sensitivity("0.gate", 0.10, 0.01, 280),
        Sensitivity("0.down", 0.50, 0.49, 280),
        Sensitivity("1.gate", 0.20, 0.01, 280),
        Sensitivity("1.down", 0.01, 0.02, 280),
    ]
    changed, notes = widen(plan, found, outputs, INT8)  # room for 480 bytes: one site
    assert [s.site for s in changed if s.weights.format == "int8"] == ["1.gate"]
    assert changed[2].weight_group == 64
    assert notes == ["1.gate: weights kept int8"]
    changed, _ = widen(plan, found, outputs, MixedScheme("int8", 2))  # room for all; one gains nothing
    assert [s.site for s in changed if s.weights.format == "int8"] == ["0.gate", "0.down", "1.gate"]
    assert widen(plan, found, outputs, MixedScheme("int8", 1.01)) == (plan, [])


def test_a_weight_that_rounds_badly_is_found() -> None:
    recipe = from_mapping(
        {"weights": {"format": "int4", "group": 32}, "activations": {"format": "int8", "mode": "dynamic"}}
    )
    model = tiny_model("llama")
    # One large weight per group leaves nothing for the others.
    model.model.layers[0].self_attn.o_proj.weight.data[:, ::32] *= 40
    graph = export(open_checkpoint(model))
    network = Network(graph, plan_sites(graph, recipe), {}, recipe)
    windows = np.random.default_rng(0).integers(3, 90, (2, 24))
    found = sensitivities(network, windows, INT8, lambda done, of: None)
    assert len(found) == 14
    assert all(0 < s.wide < s.narrow for s in found)
    assert max(found, key=lambda s: s.narrow).site == "0.output"


@pytest.mark.parametrize(
    ("fields", "message"), [({"format": "int4"}, "mixed.format"), ({"budget": 0.5}, "budget: 0.5")]
)
def test_impossible_budgets_are_refused(fields, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        MixedScheme(**fields)
