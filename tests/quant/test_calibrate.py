"""Calibration statistics, against NumPy on all tokens at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotexport.errors import RecipeError
from rotexport.quant.calibrate import Probe, calibrate
from rotexport.quant.formats import ACTIVATION_FORMATS
from rotexport.quant.scheme import ActivationScheme

BUDGET = 1 << 30


def model(channels, scale=lambda window: 1.0):
    """A fake graph: tensor t is a random linear function of the one-hot token ids, [1, S, channels]."""
    tables = {
        name: np.random.default_rng(len(name)).standard_normal((50, width)).astype(np.float32)
        for name, width in channels.items()
    }
    calls = []

    def run(windows, names):
        calls.append(list(names))
        for index, window in enumerate(windows):
            yield {name: tables[name][window][None] * np.float32(scale(index)) for name in names}

    return run, tables, calls


def windows_of(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 50, length) for length in lengths]


def statistics_of(values):
    """Calibrate on given values [tokens, channels], one window per 7 tokens."""
    values = np.asarray(values, np.float32)
    pieces = np.split(values, range(7, len(values), 7))
    windows = [np.zeros(len(piece), np.int64) for piece in pieces]
    probe = Probe("x", values.shape[1], ("site",))
    return calibrate(lambda w, n: ({"x": piece} for piece in pieces), [probe], windows, BUDGET)["site"]


def test_statistics_equal_numpys():
    run, tables, _ = model({"a": 9}, scale=lambda index: 1 + 3 * index)
    windows = windows_of(5, 11, 1)
    seen = calibrate(run, [Probe("a", 9, ("0.query", "0.key"))], windows, BUDGET)
    values = np.concatenate([tables["a"][w] * (1 + 3 * i) for i, w in enumerate(windows)])
    statistics = seen["0.query"]
    assert statistics is seen["0.key"]
    assert np.array_equal(statistics.token_maxima, np.abs(values).max(axis=1))
    assert np.array_equal(statistics.channel_maxima, np.abs(values).max(axis=0))
    assert statistics.maximum == np.abs(values).max()
    assert statistics.histogram.sum() == values.size
    assert statistics.token_ratio == pytest.approx(
        np.abs(values).max() / np.median(np.abs(values).max(axis=1)), rel=1e-6
    )
    centred = values.astype(np.float64) - values.mean(dtype=np.float64)
    # float32 sums of up to 153 fourth powers.
    assert statistics.kurtosis == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2, rel=1e-4)


def test_kurtosis_of_a_normal_distribution_is_three():
    values = np.random.default_rng(0).standard_normal((2000, 64))
    assert statistics_of(values).kurtosis == pytest.approx(3, abs=0.1)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 99),
    percent=st.sampled_from([60.0, 90.0, 99.0, 99.9, 100.0]),
    growth=st.floats(0.01, 30),
)
def test_percentiles_are_within_a_bin_of_the_sorted_values(seed, percent, growth):
    values = np.random.default_rng(seed).standard_normal((29, 13)) * np.linspace(1, growth, 29)[:, None]
    statistics = statistics_of(values)
    magnitudes = np.sort(np.abs(values.astype(np.float32)).ravel())
    rank = int(np.ceil(magnitudes.size * percent / 100)) - 1
    assert magnitudes[rank] <= statistics.percentile(percent) <= magnitudes[rank] * (1 + 2**-7)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_the_range_of_least_error_matches_a_dense_search(name):
    values = np.random.default_rng(1).standard_t(4, (300, 64))
    number_format = ACTIVATION_FORMATS[name]

    def error(limit):
        rounded = number_format.fake_quantize(values, limit / number_format.highest)
        return ((rounded - values) ** 2).sum()

    statistics = statistics_of(values)
    dense = min(error(statistics.maximum * clip) for clip in np.linspace(0.02, 1, 400))
    assert error(statistics.least_error_range(number_format)) <= 1.05 * dense
    if name == "int4":  # where clipping must pay
        assert error(statistics.least_error_range(number_format)) < 0.7 * error(statistics.maximum)


def test_static_scales():
    values = np.random.default_rng(1).standard_normal((100, 10))
    statistics = statistics_of(values)
    largest = float(np.abs(values.astype(np.float32)).max())
    assert statistics.static_scale(ActivationScheme("int8")) == pytest.approx(largest / 127)
    assert statistics.static_scale(ActivationScheme("int8", clip=0.5)) == pytest.approx(largest / 254)
    assert statistics.static_scale(ActivationScheme("fp8")) == pytest.approx(largest / 448)
    assert statistics.static_scale(ActivationScheme("int4", observer="mse")) < largest / 7
    percentile = ActivationScheme("int8", observer="percentile", percentile=90)
    assert statistics.static_scale(percentile) == pytest.approx(
        np.quantile(np.abs(values), 0.9) / 127, rel=0.02
    )


def test_an_input_of_zeros_has_a_usable_scale():
    statistics = statistics_of(np.zeros((10, 4)))
    for observer in ("max", "percentile", "mse"):
        assert statistics.static_scale(ActivationScheme("int8", observer=observer)) > 0
    assert (statistics.token_ratio, statistics.channel_ratio, statistics.kurtosis) == (1, 1, 0)


def test_ratios_of_a_massive_token_and_an_outlier_channel():
    values = np.ones((21, 8), np.float32)
    values[0] = 237
    assert statistics_of(values).token_ratio == 237
    values = np.ones((21, 8), np.float32)
    values[:, 3] = 40
    assert (statistics_of(values).channel_ratio, statistics_of(values).token_ratio) == (40, 1)


def test_runs_stay_within_the_budget():
    widths = {"a": 10, "bb": 20, "ccc": 30, "dddd": 100}
    run, _, calls = model(widths)
    windows = windows_of(4, 16)
    probes = [Probe(name, width, (f"site {name}",)) for name, width in widths.items()]
    seen = calibrate(run, probes, windows, budget_bytes=4 * 16 * 60)
    assert calls == [["a", "bb", "ccc"], ["dddd"]]  # 60 channels together; the last is too wide, but must run
    assert set(seen) == {f"site {name}" for name in widths}
    everything, _, calls = model(widths)
    again = calibrate(everything, probes, windows, BUDGET)
    assert len(calls) == 1
    assert all(np.array_equal(seen[site].histogram, again[site].histogram) for site in seen)


@pytest.mark.parametrize("windows", [[], [np.zeros(0, np.int64)]])
def test_calibration_without_text_is_refused(windows):
    run, _, _ = model({"a": 3})
    with pytest.raises(RecipeError, match="at least one window"):
        calibrate(run, [Probe("a", 3, ("s",))], windows, BUDGET)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    values = np.ones((9, 3))
    values[8, 1] = bad
    with pytest.raises(RecipeError, match="not finite in 'x'"):
        statistics_of(values)
