"""What recipes may ask of streaming attention."""

import pytest

from rotexport.errors import RecipeError
from rotexport.quant.scheme import CacheScheme
from rotexport.recipe import Recipe, from_mapping, parse_recipe
from rotexport.streaming.cache import CacheFormat
from rotexport.streaming.scheme import AttentionScheme


def test_defaults_keep_dense_attention() -> None:
    assert not AttentionScheme().streaming
    assert AttentionScheme("streaming").streaming


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "sliding"}, "sliding"),
        ({"window": 0}, "attention.window: 0"),
        ({"window": True}, "attention.window: True"),
        ({"sinks": -1}, "attention.sinks: -1"),
        ({"sinks": 9, "window": 8}, "attention.sinks: 9"),
        ({"decay": -0.1}, "attention.decay: -0.1"),
        ({"decay": float("nan")}, "attention.decay: nan"),
        ({"decay": [0.1, -2.0]}, "attention.decay: -2.0"),
        ({"decay": "steep"}, "attention.decay: 'steep'"),
        ({"eviction": "oldest"}, "attention.eviction: 'oldest'"),
    ],
)
def test_nonsense_is_refused_with_its_value(values: dict[str, object], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        AttentionScheme(**{"kind": "streaming", **values})  # type: ignore[arg-type]


def test_a_cache_section_names_a_format() -> None:
    asked = AttentionScheme().cache_format(CacheScheme("int2", "int2", 16, recent=128, center=True))
    assert asked == CacheFormat(2, 16, 128, True)
    assert asked.operator == "SinkWindowAttentionInt2CenteredRecent"
    assert AttentionScheme().cache_format(CacheScheme()).operator == "SinkWindowAttention"


@pytest.mark.parametrize(
    ("section", "named"),
    [
        (CacheScheme("int8", "int4"), "int8 and int4"),
        (CacheScheme("int8", "int8", clip=0.9), "0.9"),
        (CacheScheme("int4", "int4", recent=30), "30 tokens"),
        (CacheScheme(center=True), "quantized cache"),
        (CacheScheme(recent=4), "quantized cache"),
    ],
)
def test_what_streaming_cannot_store_is_refused(section: CacheScheme, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        AttentionScheme(window=20).cache_format(section)


def test_decay_is_one_for_all_one_each_or_alibis() -> None:
    assert AttentionScheme(decay=0.5).slopes(3) == [0.5] * 3
    assert AttentionScheme(decay=[0.5, 0.25]).slopes(2) == [0.5, 0.25]
    with pytest.raises(RecipeError, match="2 numbers do not fit 3 query heads"):
        AttentionScheme(decay=[0.5, 0.25]).slopes(3)
    assert AttentionScheme(decay="alibi").slopes(8) == [2.0**-h for h in range(1, 9)]
    nine = AttentionScheme(decay="alibi").slopes(9)
    assert nine == [*(2.0**-h for h in range(1, 9)), 2.0**-0.5], "then from the slopes of sixteen heads"


@pytest.mark.parametrize(
    "attention",
    [
        AttentionScheme("streaming", decay="alibi"),
        AttentionScheme("streaming", decay=(0.5, 0.0)),
        AttentionScheme("streaming", eviction={"policy": "snapkv", "context": 8192}),
    ],
)
def test_recipes_read_back_what_they_wrote(attention: AttentionScheme) -> None:
    recipe = Recipe(attention=attention)
    assert parse_recipe(recipe.to_yaml(), "recipe.yaml") == recipe


def test_eviction_and_codes_are_refused_by_the_recipe_itself() -> None:
    evicting = {"kind": "streaming", "eviction": {"policy": "snapkv", "context": 8192}}
    from_mapping({"attention": evicting})
    with pytest.raises(RecipeError, match="snapkv keeps tokens in floating point, not in int4"):
        from_mapping({"attention": evicting, "kv_cache": {"key": "int4", "value": "int4"}})
