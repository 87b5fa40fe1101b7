"""Balancing the input of down projections: the same function, and the least error behind a rotation."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.feeds import decoder_feeds
from support.graphs import graph_of, run
from support.models import MLP, decoder

from rotexport.graph.sites import linears
from rotexport.graph.weights import weight_of
from rotexport.passes.smooth_inputs import STRONGEST, SmoothDownInputs, smoothing


def test_the_function_stays_and_weights_change() -> None:
    graph = graph_of(decoder())
    feeds = decoder_feeds(graph)
    before = run(graph, **feeds)
    weights = {site.name: weight_of(site.weight).read() for site in linears(graph)}
    power = np.geomspace(0.1, 10, MLP)
    report = SmoothDownInputs({"0.down": power, "1.down": power}).run(graph)
    assert report.changed == 2
    for first, second in zip(before, run(graph, **feeds), strict=True):
        np.testing.assert_allclose(second, first, atol=2e-5 * np.abs(first).max())
    after = {site.name: weight_of(site.weight).read() for site in linears(graph)}
    changed = {name for name, weight in weights.items() if not np.array_equal(weight, after[name])}
    assert changed == {"0.up", "0.down", "1.up", "1.down"}


def test_a_nonlinear_input_is_left_alone_and_said() -> None:
    graph = graph_of(decoder(1, gated=False))
    report = SmoothDownInputs({"0.down": np.ones(MLP)}).run(graph)
    assert report.changed == 0
    assert report.notes == ["0.down: its input is no product with a linear; left as it is"]


@given(st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_no_other_scaling_gives_a_smaller_product_of_norms(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    power = rng.uniform(0.3, 3, size)
    weight = rng.standard_normal((size, 5)) * rng.uniform(0.3, 3, (size, 1))

    def error(scales: np.ndarray) -> float:
        return float(np.linalg.norm(power / scales) * np.linalg.norm(weight * scales[:, None]))

    best = error(smoothing(power, weight))
    assert best <= error(np.ones(size)) * (1 + 1e-9)
    for _ in range(5):
        assert best <= error(rng.uniform(0.2, 5, size)) * (1 + 1e-9)


def test_channels_that_never_fire_or_count_get_a_finite_scale() -> None:
    power, weight = np.ones(8), np.ones((8, 3))
    power[2], weight[5] = 0, 0
    np.testing.assert_array_equal(smoothing(power, weight), np.ones(8))
    power[0] = 1e9
    assert smoothing(power, weight).max() == STRONGEST
    np.testing.assert_array_equal(smoothing(np.zeros(4), np.ones((4, 2))), np.ones(4))
