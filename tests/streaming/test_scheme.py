"""What recipes may ask of streaming attention."""

import pytest

from rotexport.errors import RecipeError
from rotexport.quant.scheme import CacheScheme
from rotexport.streaming.cache import CacheFormat
from rotexport.streaming.scheme import AttentionScheme, stream_format


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
    asked = stream_format(CacheScheme("int2", "int2", 16, recent=128, center=True), 1020)
    assert asked == CacheFormat(2, 16, 128, True)
    assert asked.operator == "SinkWindowAttentionInt2Recent"
    assert stream_format(CacheScheme(), 1).operator == "SinkWindowAttention"


@pytest.mark.parametrize(
    ("section", "named"),
    [
        (CacheScheme("int8", "int4"), "int8 and int4"),
        (CacheScheme("int8", "int8", clip=0.9), "0.9"),
        (CacheScheme("int4", "int4", recent=30), "30 tokens"),
        (CacheScheme("int4", "int4", center=True), "kv_cache.recent"),
        (CacheScheme(recent=4), "quantized cache"),
    ],
)
def test_what_streaming_cannot_store_is_refused(section: CacheScheme, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        stream_format(section, 20)
