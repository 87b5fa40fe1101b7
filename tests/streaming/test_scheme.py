"""What recipes may ask of streaming attention."""

import pytest

from rotexport.errors import RecipeError
from rotexport.streaming.cache import CacheFormat
from rotexport.streaming.scheme import AttentionScheme, StreamCache


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
        ({"eviction": "oldest"}, "attention.eviction: 'oldest'"),
    ],
)
def test_nonsense_is_refused_with_its_value(values: dict[str, object], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        AttentionScheme(**{"kind": "streaming", **values})  # type: ignore[arg-type]


def test_a_cache_section_names_a_format() -> None:
    asked = StreamCache("int2", "int2", 16, recent=128, center=True)
    assert asked.format(1020) == CacheFormat(2, 16, 128, True)
    assert asked.format(1020).operator == "SinkWindowAttentionInt2Recent"
    assert StreamCache().format(1).operator == "SinkWindowAttention"


@pytest.mark.parametrize(
    ("section", "named"),
    [
        (StreamCache("int8", "int4"), "int8 and int4"),
        (StreamCache("fp8", "fp8"), "'fp8'"),
        (StreamCache("int8", "int8", clip=0.9), "0.9"),
        (StreamCache("int4", "int4", recent=30), "30 tokens"),
        (StreamCache("int4", "int4", center=True), "kv_cache.recent"),
        (StreamCache(recent=4), "quantized cache"),
    ],
)
def test_what_streaming_cannot_store_is_refused(section: StreamCache, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        section.format(20)
