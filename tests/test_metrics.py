"""Metrics against the textbook formulas, written with SciPy-like one-liners in float64."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotexport import metrics
from rotexport.errors import RecipeError
from rotexport.metrics import (
    EQUAL_DB,
    Thresholds,
    compare_logits,
    cosine,
    max_abs_error,
    sqnr_db,
    token_sqnr_db,
)

RANDOM = np.random.default_rng(0)
REFERENCE = RANDOM.normal(0, 4, (7, 50)).astype(np.float32)
NOISE = RANDOM.normal(0, 0.1, (7, 50)).astype(np.float32)


def softmax(logits):
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(axis=-1, keepdims=True)


def test_each_figure_is_the_textbook_formula():
    candidate = REFERENCE + NOISE
    result = compare_logits(REFERENCE, candidate)
    r, c = REFERENCE.astype(np.float64), candidate.astype(np.float64)
    p, q = softmax(REFERENCE), softmax(candidate)
    assert result.tokens == 7
    assert result.max_abs_error == pytest.approx(np.abs(r - c).max())
    assert result.logit_scale == pytest.approx(np.abs(r).max())
    assert result.sqnr_db == pytest.approx(10 * np.log10((r**2).sum() / ((r - c) ** 2).sum()))
    assert result.cosine == pytest.approx((r * c).sum() / np.linalg.norm(r) / np.linalg.norm(c))
    assert result.kl == pytest.approx((p * np.log(p / q)).sum(axis=-1).mean())
    assert result.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert result.relative_error == pytest.approx(np.abs(r - c).max() / np.abs(r).max())


def test_blocks_of_rows_change_nothing(monkeypatch):
    whole = compare_logits(REFERENCE, REFERENCE + NOISE)
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 120)  # two rows at a time
    assert compare_logits(REFERENCE, REFERENCE + NOISE).to_dict() == pytest.approx(whole.to_dict())


def test_equal_logits_have_no_error():
    result = compare_logits(REFERENCE, REFERENCE.copy())
    assert (result.max_abs_error, result.kl, result.top1_agreement) == (0.0, 0.0, 1.0)
    assert result.sqnr_db == EQUAL_DB
    assert result.cosine == pytest.approx(1.0)
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_single_changed_winner_lowers_the_agreement():
    candidate = REFERENCE.copy()
    candidate[2, REFERENCE[2].argmin()] = 100.0
    assert compare_logits(REFERENCE, candidate).top1_agreement == pytest.approx(6 / 7)


def test_divergence_is_directed():
    sure, unsure = np.array([[8.0, 0.0]]), np.array([[0.0, 0.0]])
    assert compare_logits(sure, unsure).kl == pytest.approx(np.log(2), rel=0.01)
    assert compare_logits(unsure, sure).kl == pytest.approx(4 - np.log(2), rel=0.01)


@given(shift=st.floats(-1e4, 1e4))
def test_a_common_shift_is_not_a_divergence(shift):
    logits = REFERENCE.astype(np.float64)
    assert compare_logits(logits, logits + shift).kl == pytest.approx(0.0, abs=1e-9)


def test_large_logits_do_not_overflow():
    logits = np.array([[30000.0, -30000.0, 0.0]], np.float32)
    np.testing.assert_allclose(metrics.log_softmax(logits), [[0.0, -60000.0, -30000.0]])


def test_loss_is_that_of_the_chosen_tokens(monkeypatch):
    targets = np.array([0, 49, 3, 3, 7, 1, 20])
    expected = -np.log(softmax(REFERENCE)[np.arange(7), targets]).sum()
    assert metrics.negative_log_likelihood(REFERENCE, targets) == pytest.approx(expected)
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 150)
    assert metrics.negative_log_likelihood(REFERENCE, targets) == pytest.approx(expected)
    with pytest.raises(ValueError, match="do not fit"):
        metrics.negative_log_likelihood(REFERENCE, targets[:-1])


def test_halving_the_noise_gains_six_decibels():
    gain = sqnr_db(REFERENCE, REFERENCE + NOISE / 2) - sqnr_db(REFERENCE, REFERENCE + NOISE)
    assert gain == pytest.approx(20 * np.log10(2), rel=1e-4)


def test_zeros_have_defined_ratios():
    zero, one = np.zeros(3), np.ones(3)
    assert (sqnr_db(zero, zero), sqnr_db(zero, one)) == (EQUAL_DB, -EQUAL_DB)
    assert (cosine(zero, zero), cosine(zero, one), cosine(one, -one)) == (1.0, 0.0, pytest.approx(-1.0))


def test_an_undefined_candidate_is_not_hidden():
    broken = REFERENCE.copy()
    broken[3, 3] = np.nan
    assert np.isnan(max_abs_error(REFERENCE, broken))


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 50\)"):
        compare_logits(REFERENCE, REFERENCE[:6])


def test_a_token_of_enormous_power_hides_nothing_per_token():
    stream, wrong = np.ones((3, 8)), np.ones((3, 8))
    stream[0] *= 1e4
    wrong[0] *= 1e4
    wrong[2] = -1
    assert sqnr_db(stream, wrong) > 70
    assert token_sqnr_db(stream, wrong) == pytest.approx([EQUAL_DB, EQUAL_DB, -6.02], abs=0.01)


def test_thresholds_are_upper_or_lower_bounds():
    figures = {"kl": 0.2, "top1_agreement": 0.9, "sqnr_db": 25.0}
    results = Thresholds(kl=0.1, top1_agreement=0.8, sqnr_db=30).check(figures)
    assert {result.name: result.passed for result in results} == {
        "kl": False,
        "top1_agreement": True,
        "sqnr_db": False,
    }
    assert str(results[0]) == "missed: kl is 0.2, at most 0.1 was asked"
    assert str(results[1]) == "top1_agreement is 0.9, at least 0.8 was asked"


def test_what_is_not_asked_is_not_judged():
    assert Thresholds().check({"kl": 5.0}) == []


def test_what_is_asked_and_not_measured_fails():
    (result,) = Thresholds(perplexity_ratio=1.1).check({"kl": 5.0})
    assert not result.passed
    assert str(result) == "missed: perplexity_ratio could not be measured, at most 1.1 was asked"


def test_a_limit_that_is_met_exactly_passes_and_nan_does_not():
    limits = Thresholds(kl=0.1, top1_agreement=1.0)
    assert [result.passed for result in limits.check({"kl": 0.1, "top1_agreement": 1.0})] == [True, True]
    assert [result.passed for result in limits.check({"kl": np.nan, "top1_agreement": np.nan})] == [
        False,
        False,
    ]


@pytest.mark.parametrize("limit", ["0.1", True, [1]])
def test_a_limit_that_is_no_number_is_refused(limit):
    with pytest.raises(RecipeError, match=r"thresholds\.kl"):
        Thresholds(kl=limit)
