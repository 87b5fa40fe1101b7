"""Recipes: what they say, what they refuse, and how they are put together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rotexport.errors import RecipeError
from rotexport.quant.scheme import ActivationScheme, WeightScheme
from rotexport.recipe import Rotation, from_mapping, load_recipe, parse_recipe, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_reads_back_from_its_own_yaml(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(recipe.to_yaml(), name) == recipe
    assert recipe.name == name
    assert recipe.description
    assert recipe.thresholds.perplexity_ratio is not None


def test_a_recipe_extends_another_key_by_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: quarot-w8a8\nrotations: {r4: {kind: hadamard, block: 64}}\nweights: {group: 32}\n"
    )
    recipe = load_recipe(str(path))
    assert recipe.name == "mine"
    assert recipe.rotations.r1 == Rotation("random-hadamard")
    assert recipe.rotations.r4 == Rotation("hadamard", block=64)
    assert (recipe.weights.format, recipe.weights.group) == ("int8", 32)


def test_settings_come_last() -> None:
    recipe = load_recipe(
        "quarot-w8a8", ["rotations.r1.seed=7", "activations.mode=dynamic", "kv_cache.key=int8"]
    )
    assert recipe.rotations.r1 == Rotation("random-hadamard", seed=7)
    assert recipe.activations.mode == "dynamic"
    assert recipe.kv_cache.key == "int8"


def test_the_last_matching_override_wins_and_the_head_stays_float() -> None:
    recipe = from_mapping(
        {
            "weights": {"format": "int8"},
            "overrides": [
                {"site": "*.down", "weights": {"format": "int4", "group": 16}},
                {"site": "3.*", "activations": {"format": "int8", "mode": "dynamic"}},
            ],
        }
    )
    assert recipe.schemes("0.query") == (WeightScheme("int8"), ActivationScheme())
    assert recipe.schemes("3.down") == (WeightScheme("int4", 16), ActivationScheme("int8", "dynamic"))
    assert recipe.schemes("head") == (WeightScheme(), ActivationScheme())


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"wieghts": {}}, "unknown key 'wieghts'; did you mean 'weights'"),
        ({"rotations": {"r5": "hadamard"}}, "unknown key 'rotations.r5'"),
        ({"rotations": {"r1": "hadamrad"}}, "kind 'hadamrad' is not one of none, hadamard"),
        ({"rotations": {"r4": "orthogonal"}}, "rotations.r4: 'orthogonal' is dense"),
        ({"rotations": {"r1": {"kind": "orthogonal", "block": 8}}}, "takes no block"),
        ({"rotations": {"o_heads": {"kind": "hadamard", "block": 8}}}, "o_heads mixes all heads"),
        ({"dtype": "fp64"}, "dtype: 'fp64' is not one of fp32, fp16, bf16"),
        ({"weights": "int8"}, "weights: expected a mapping"),
        ({"activations": {"format": "int8"}}, "needs quantized weights"),
        ({"thresholds": {"kl": "small"}}, "thresholds.kl: 'small' is not a number"),
        ({"overrides": [{"weights": {"format": "int8"}}]}, "needs a `site`"),
        ({"attention": {"kind": "streaming", "widow": 4}}, "unknown key 'attention.widow'"),
        ({"gptq": {"ridge": -1}}, "gptq.ridge: -1 is not a number of at least 0"),
        ({"gptq": {"residual": 1}}, "gptq.residual: 1 is not true or false"),
        ({"gptq": {"windows": 0}}, "gptq.windows: 0 is not a positive number of windows"),
        ({"kv_cache": {"key": "int2"}}, "kv_cache.key: int2 needs a bounded cache"),
        ({"kv_cache": {"value": "fp8"}}, "kv_cache.value: fp8 needs a bounded cache"),
        ({"kv_cache": {"recent": 8}}, "kv_cache.recent: 8 needs a bounded cache"),
        ({"kv_cache": {"center": "yes"}}, "kv_cache.center: 'yes'"),
        ({"attention": {"kind": "streaming"}, "kv_cache": {"key": "int8"}}, "int8 and none"),
    ],
)
def test_nonsense_is_refused_by_name(mapping, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        from_mapping(mapping)


def test_missing_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'quarot-w8a8'"):
        load_recipe("quarot-w8a")
    with pytest.raises(RecipeError, match=r"missing\.yaml' does not exist"):
        load_recipe(str(tmp_path / "missing.yaml"))
    (tmp_path / "broken.yaml").write_text("weights: {format")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(str(tmp_path / "broken.yaml"))


def test_a_rotation_without_a_block_takes_the_largest_that_divides() -> None:
    transform = Rotation("hadamard").transform(13696)
    assert "128" in transform.describe()
    np.testing.assert_allclose(
        transform.dense()[:128, :128] @ transform.dense()[:128, :128].T, np.eye(128), atol=1e-12
    )


@pytest.mark.parametrize(
    ("section", "value", "words"),
    [
        ("learn_rotations", {"steps": -1}, r"^learn_rotations\.steps: -1 is not"),
        ("learn_affine", {"batch": 0}, r"^learn_affine\.batch: 0 is not"),
        ("reconstruct", {"seed": "x"}, r"^reconstruct\.seed: 'x' is not"),
        ("correct_head", {"windows": -1}, r"^correct_head\.windows: -1 is not a number of windows"),
        ("correct_head", {"ridge": 0}, r"^correct_head\.ridge: 0 is not a number above 0"),
        ("correct_head", {"windows": 8}, "^correct_head takes up the error of quantized weights"),
        ("distill", {"weight_rate": 2}, r"^distill\.weight_rate: 2 is not"),
        ("distill", {"steps": 3, "weight_rate": 0, "scale_rate": 0}, "^distill: all rates are 0"),
    ],
)
def test_an_illegal_value_is_named_with_its_section(section, value, words):
    with pytest.raises(RecipeError, match=words):
        from_mapping({section: value})
