"""Schemes refuse what they cannot do, naming the key, the value and the remedy."""

import pytest

from rotexport.errors import RecipeError
from rotexport.quant.scheme import ActivationScheme, CacheScheme, WeightScheme, group_size


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WeightScheme("int5"), "weights.format: 'int5'"),
        (lambda: WeightScheme("int4", method="awq"), "weights.method: 'awq'"),
        (lambda: WeightScheme("int4", group=0), "weights.group: 0"),
        (lambda: WeightScheme("int4", group="big"), "weights.group: 'big'"),
        (lambda: WeightScheme("int4", group=True), "weights.group: True"),
        (lambda: WeightScheme("fp8", symmetric=False), "weights.symmetric: false needs integer codes"),
        (lambda: WeightScheme("int8", symmetric="no"), "weights.symmetric: 'no' is not true or false"),
        (lambda: ActivationScheme("int2"), "activations.format: 'int2'"),
        (lambda: ActivationScheme("int8", mode="token"), "activations.mode: 'token'"),
        (lambda: ActivationScheme("int8", observer="mean"), "activations.observer: 'mean'"),
        (lambda: ActivationScheme("int8", percentile=101), "activations.percentile: 101"),
        (lambda: ActivationScheme("int8", clip=0), "activations.clip: 0"),
        (lambda: ActivationScheme("int8", clip="half"), "activations.clip: 'half'"),
        (lambda: ActivationScheme("int8", mode="static", group=64), "activations.group: 64 needs"),
        (lambda: ActivationScheme("int8", "dynamic", symmetric=False), "activations.symmetric: false is for"),
        (
            lambda: ActivationScheme("int4", symmetric=False),
            "activations.symmetric: false .* not static int4",
        ),
        (lambda: ActivationScheme(symmetric=1), "activations.symmetric: 1 is not true or false"),
        (lambda: CacheScheme("fp4"), "kv_cache.key: 'fp4'"),
        (lambda: CacheScheme("int4", "int3"), "kv_cache.value: 'int3'"),
        (lambda: CacheScheme("int4", clip=1.5), "kv_cache.clip: 1.5"),
        (lambda: CacheScheme("int4", group=-4), "kv_cache.group: -4"),
    ],
)
def test_an_illegal_value_is_refused(make, words):
    with pytest.raises(RecipeError, match="^" + words):
        make()


def test_legal_schemes_are_made():
    assert not WeightScheme().enabled
    assert WeightScheme("int4", "auto").enabled
    assert ActivationScheme("int4", "dynamic", group=64).enabled
    assert CacheScheme("none", "int4").enabled
    assert not CacheScheme().enabled


@pytest.mark.parametrize(
    ("group", "length", "size"),
    [
        (None, 60, 60),
        (12, 60, 12),
        ("auto", 1536, 64),
        ("auto", 64, 64),
        ("auto", 96, 32),
        ("auto", 48, 16),
        ("auto", 100, 100),
    ],
)
def test_the_size_of_a_group(group, length, size):
    assert group_size(group, length, "weights.group", "site 0.up") == size


def test_a_matrix_is_never_one_group_by_itself_and_a_cached_head_may_be():
    assert group_size("auto", 64, "weights.group", "site 0.up", least_groups=2) == 32
    assert group_size("auto", 64, "kv_cache.group", "a head") == 64


@pytest.mark.parametrize(
    ("group", "remedy"),
    [(128, "use 96 or 144, or 'auto'"), (700, "use 576, or 'auto'"), (7, "use 6 or 8, or 'auto'")],
)
def test_a_group_that_does_not_divide_is_refused_with_the_nearest_that_do(group, remedy):
    with pytest.raises(
        RecipeError, match=f"weights.group: {group} does not divide the 576 .* site 0.up; {remedy}"
    ):
        group_size(group, 576, "weights.group", "site 0.up")
