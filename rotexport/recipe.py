"""What a build should do: a typed recipe, read from YAML, with every unknown key refused.

A recipe file may start from another (`extends: quarot-w8a8`). Rotations, formats and thresholds are checked
when the recipe is made, before any model is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

from rotexport.errors import RecipeError
from rotexport.learning.training import AffineTraining, RotationTraining, Training
from rotexport.metrics import Thresholds
from rotexport.quant.scheme import (
    ActivationScheme,
    CacheScheme,
    ClipSearch,
    GptqSettings,
    HeadCorrection,
    MixedScheme,
    WeightScheme,
)
from rotexport.streaming.scheme import AttentionScheme
from rotexport.transforms.rotation_file import read_rotation
from rotexport.transforms.transform import Hadamard, OrthogonalMatrix, Transform

KINDS: Final = ("none", "hadamard", "random-hadamard", "orthogonal", "principal", "learned", "file")
DTYPES: Final = ("fp32", "fp16", "bf16")
DENSE: Final = ("orthogonal", "principal", "learned", "file")
ONLINE_ROTATIONS: Final = ("r3", "r4", "o_heads")

SMOOTHINGS: Final = ("none", "down")  # what is balanced before it is rotated
CALIBRATION_WINDOWS: Final = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Rotation:
    """One rotation of a recipe.

    `kind` is `none`, `hadamard`, `random-hadamard` (a Hadamard behind random signs drawn from `seed`), or a
    dense one, only where it folds: `orthogonal` (random), `learned` (from a random Hadamard on, as the
    section `learn_rotations` says), `file` (from a `file` like SpinQuant's `R.bin`) or `principal` (from
    calibration text in closed form, and balanced; behind norms a scale and a Hadamard then run online).
    `block` limits Hadamards to blocks of that length.
    """

    kind: str = "none"
    seed: int = 0
    block: int | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"rotation kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise RecipeError(f"rotation seed {self.seed!r} is not a non-negative integer")
        if self.block is not None and (not isinstance(self.block, int) or self.block < 1):
            raise RecipeError(f"rotation block {self.block!r} is not a positive integer")
        if self.kind in DENSE and self.block is not None:
            raise RecipeError(f"a rotation of kind '{self.kind}' is dense and takes no block; remove it")
        if (self.kind == "file") != (self.file is not None):
            raise RecipeError("a rotation of kind 'file', and no other, needs its `file`")

    @property
    def enabled(self) -> bool:
        """Whether there is anything to rotate."""
        return self.kind != "none"

    def transform(self, size: int, layer: int | None = None) -> Transform:
        """Return the transform for an axis of `size`: without a block, the largest Hadamard that divides.

        Each `layer` has one of its own. What is learned starts here.

        Raises:
            TransformError: the asked block does not divide the axis, or has no Hadamard matrix; or the file
                does not hold the matrix.

        """
        seed = self.seed + (layer or 0)
        if self.file is not None:
            return read_rotation(Path(self.file), layer, size)
        if self.kind == "orthogonal":
            return OrthogonalMatrix.random(size, seed)
        return Hadamard.of(size, self.block, None if self.kind == "hadamard" else seed)


@dataclass(frozen=True)
class Rotations:
    """Which streams rotate: residual, values, queries and keys, down inputs, heads (DESIGN: R1 to R4)."""

    r1: Rotation = Rotation()
    r2: Rotation = Rotation()
    r3: Rotation = Rotation()
    r4: Rotation = Rotation()
    o_heads: Rotation = Rotation()

    def __post_init__(self) -> None:
        for name in ONLINE_ROTATIONS:
            if (kind := getattr(self, name).kind) in DENSE:
                raise RecipeError(
                    f"rotations.{name}: '{kind}' is dense and cannot run online; "
                    "use 'hadamard' or 'random-hadamard'"
                )
        if self.r2.kind == "learned" and self.o_heads.enabled:
            raise RecipeError(
                "rotations.r2: 'learned' needs heads that are not mixed; set rotations.o_heads to none, "
                "or rotations.r2 to hadamard"
            )
        if self.o_heads.kind == "random-hadamard" or self.o_heads.block is not None:
            raise RecipeError(
                "rotations.o_heads mixes all heads by a plain Hadamard; use kind: hadamard without a block"
            )

    @property
    def learned(self) -> bool:
        """Whether R1 or R2 is learned."""
        return "learned" in (self.r1.kind, self.r2.kind)

    @property
    def principal(self) -> bool:
        """Whether R1 or R2 comes from calibration text in closed form."""
        return "principal" in (self.r1.kind, self.r2.kind)

    @property
    def in_file(self) -> bool:
        """Whether R1 or R2 can be known from a file only."""
        return bool({"learned", "file"} & {self.r1.kind, self.r2.kind})

    @property
    def enabled(self) -> bool:
        """Whether any rotation is asked for."""
        return any(getattr(self, f.name).enabled for f in fields(self))

    def without(self) -> Rotations:
        """Return the same recipe section with nothing rotated."""
        return Rotations()


@dataclass(frozen=True)
class Override:
    """Schemes for the sites that a pattern (`11.down`, `*.down`, `head`) matches; None keeps the recipe's."""

    site: str
    weights: WeightScheme | None = None
    activations: ActivationScheme | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything a build decides about numbers."""

    name: str = "custom"
    description: str = ""
    dtype: str = "fp16"
    smoothing: str = "none"
    rotations: Rotations = Rotations()
    weights: WeightScheme = field(default_factory=WeightScheme)
    activations: ActivationScheme = field(default_factory=ActivationScheme)
    gptq: GptqSettings = field(default_factory=GptqSettings)
    learn_rotations: RotationTraining = field(default_factory=RotationTraining)
    learn_affine: AffineTraining = field(default_factory=AffineTraining)
    reconstruct: Training = field(default_factory=Training)
    distill: Training = field(default_factory=Training)
    mixed: MixedScheme = field(default_factory=MixedScheme)
    clip_search: ClipSearch = field(default_factory=ClipSearch)
    correct_head: HeadCorrection = field(default_factory=HeadCorrection)
    calibration_windows: int = CALIBRATION_WINDOWS
    kv_cache: CacheScheme = field(default_factory=CacheScheme)
    attention: AttentionScheme = field(default_factory=AttentionScheme)
    overrides: tuple[Override, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.smoothing not in SMOOTHINGS:
            raise RecipeError(f"smoothing: {self.smoothing!r} is not one of {', '.join(SMOOTHINGS)}")
        if not isinstance(self.calibration_windows, int) or self.calibration_windows < 1:
            raise RecipeError(
                f"calibration_windows: {self.calibration_windows!r} is not a positive number of windows"
            )
        self._check_learning()
        self._check_quantization()
        if self.attention.streaming:
            self.attention.cache_format(self.kv_cache)
        elif (setting := self.kv_cache.bounded_only) is not None:
            raise RecipeError(f"kv_cache.{setting} needs a bounded cache; set attention.kind to streaming")

    def _check_learning(self) -> None:
        if self.rotations.learned != self.learn_rotations.enabled:
            raise RecipeError(
                "rotations.r1 or r2 of kind 'learned' and learn_rotations.steps above 0 go together; "
                f"found {'no ' if not self.rotations.learned else ''}learned rotation and "
                f"{self.learn_rotations.steps} steps"
            )
        if self.rotations.learned and {self.weights.format, self.activations.format} & {"fp8"}:
            raise RecipeError("rotations are learned for int8 and int4, not for fp8; use random-hadamard")
        if self.rotations.learned and not (self.weights.enabled or self.kv_cache.enabled):
            raise RecipeError("rotations are learned for what is quantized; set weights.format")
        if self.learn_affine.enabled and self.activations.format not in ("int8", "int4"):
            raise RecipeError(
                f"learn_affine transforms activations that become integers, not {self.activations.format}; "
                "set activations.format to int8 or int4, or learn_affine.steps to 0"
            )
        if self.learn_affine.enabled and (self.rotations.r4.enabled or self.rotations.o_heads.enabled):
            raise RecipeError(
                "learn_affine and rotations.r4 or o_heads would transform the same inputs; keep one of them"
            )

    def _check_quantization(self) -> None:
        if self.clip_search.enabled and not self.activations.enabled:
            raise RecipeError(
                "clip_search tries clips of quantized activations; set activations.format, "
                "or clip_search.candidates to 0"
            )
        if self.correct_head.enabled and not self.weights.enabled:
            raise RecipeError(
                "correct_head takes up the error of quantized weights; set weights.format, "
                "or correct_head.windows to 0"
            )
        if self.activations.enabled and not self.weights.enabled:
            raise RecipeError(
                f"activations.format: {self.activations.format} needs quantized weights; "
                "set weights.format too"
            )

    @property
    def learns(self) -> bool:
        """Whether anything is learned or searched on text besides the codes of weights."""
        sections = (self.learn_rotations, self.learn_affine, self.reconstruct, self.distill, self.clip_search)
        return any(section.enabled for section in sections)

    def schemes(self, site: str) -> tuple[WeightScheme, ActivationScheme]:
        """Return what to do with one linear: the last matching override wins; else the head stays float."""
        weights, activations = self.weights, self.activations
        if site == "head":
            weights, activations = WeightScheme(), ActivationScheme()
        for override in self.overrides:
            if fnmatchcase(site, override.site):
                weights = override.weights or weights
                activations = override.activations or activations
        return weights, activations

    def check_sites(self, sites: Iterable[str]) -> None:
        """Raise RecipeError when an override matches none of the model's sites."""
        known = list(sites)
        for override in self.overrides:
            if not any(fnmatchcase(site, override.site) for site in known):
                near = get_close_matches(override.site, known, n=3)
                hint = f"near it: {', '.join(near)}" if near else "`rotexport inspect` prints them"
                raise RecipeError(f"overrides: no site matches {override.site!r}; {hint}")

    def to_yaml(self) -> str:
        """Write the recipe so that reading it back gives an equal one."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)


SECTIONS: Final[Mapping[str, type]] = {
    "weights": WeightScheme,
    "activations": ActivationScheme,
    "gptq": GptqSettings,
    "mixed": MixedScheme,
    "clip_search": ClipSearch,
    "correct_head": HeadCorrection,
    "learn_rotations": RotationTraining,
    "learn_affine": AffineTraining,
    "reconstruct": Training,
    "distill": Training,
    "kv_cache": CacheScheme,
    "attention": AttentionScheme,
    "thresholds": Thresholds,
}


def preset_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    folder = resources.files("rotexport.recipes")
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_recipe(name_or_path: str, settings: Iterable[str] = ()) -> Recipe:
    """Read a preset or a YAML file, with `section.key=value` settings on top.

    Raises:
        RecipeError: no such recipe or file, bad YAML, an unknown key, or an illegal value.

    """
    mapping = _read(name_or_path)
    for setting in settings:
        _apply_setting(mapping, setting)
    return from_mapping(mapping)


def parse_recipe(text: str, name: str) -> Recipe:
    """Read a resolved recipe, as `Recipe.to_yaml` wrote it into `name`.

    Raises:
        RecipeError: it is not one.

    """
    return from_mapping(_parse(text, name))


def from_mapping(mapping: Mapping[str, Any]) -> Recipe:
    """Make a recipe from what a YAML file holds.

    Raises:
        RecipeError: an unknown key or an illegal value.

    """
    values = dict(mapping)
    _check_keys(values, Recipe, "")
    if "rotations" in values:
        values["rotations"] = _rotations(values["rotations"])
    for key, cls in SECTIONS.items():
        if key in values:
            values[key] = _section(values[key], cls, key)
    base = Recipe(**{k: v for k, v in values.items() if k != "overrides"})
    return replace(base, overrides=tuple(_override(o, base) for o in values.get("overrides") or ()))


def _read(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"recipe file '{path}' does not exist")
        text, default_name = path.read_text(), path.stem
    else:
        names = preset_names()
        if name_or_path not in names:
            near = get_close_matches(name_or_path, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known recipes: {', '.join(names)}"
            raise RecipeError(f"no recipe is called '{name_or_path}'; {hint}")
        text, default_name = (
            (resources.files("rotexport.recipes") / f"{name_or_path}.yaml").read_text(),
            name_or_path,
        )
    mapping = _parse(text, name_or_path)
    parent = mapping.pop("extends", None)
    merged = _merge(_read(str(parent)), mapping) if parent is not None else mapping
    return {**merged, "name": mapping.get("name", default_name)}


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        mapping = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe '{name}' is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(mapping, dict):
        raise RecipeError(f"recipe '{name}' is not a mapping of sections")
    return mapping


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply_setting(mapping: dict[str, Any], setting: str) -> None:
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise RecipeError(f"setting '{setting}' is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"setting '{setting}': the value is not valid YAML") from error
    *sections, last = key.split(".")
    place = mapping
    for section in sections:
        inner = place.get(section)
        if isinstance(inner, str) and section in {f.name for f in fields(Rotations)}:
            inner = {"kind": inner}
        place[section] = dict(inner) if isinstance(inner, dict) else {}
        place = place[section]
    place[last] = value


def _rotations(value: Any) -> Rotations:
    _check_keys(value, Rotations, "rotations.")
    made = {}
    for name, spec in value.items():
        section = {"kind": spec} if isinstance(spec, str) else spec
        made[name] = _section(section, Rotation, f"rotations.{name}")
    return Rotations(**made)


def _override(value: Any, recipe: Recipe) -> Override:
    _check_keys(value, Override, "overrides.")
    if "site" not in value:
        raise RecipeError("overrides: an entry needs a `site`")
    made: dict[str, Any] = {"site": str(value["site"])}
    for key, base in (("weights", recipe.weights), ("activations", recipe.activations)):
        if key in value:
            _check_keys(value[key], type(base), f"overrides.{key}.")
            made[key] = _build(type(base), {**asdict(base), **value[key]}, f"overrides.{key}")
    return Override(**made)


def _section(value: Any, cls: type[T], name: str) -> T:
    _check_keys(value, cls, f"{name}.")
    return _build(cls, value, name)


def _build(cls: type[T], values: Mapping[str, Any], name: str) -> T:
    try:
        return cls(**values)
    except RecipeError as error:
        section, text = name.split(".", maxsplit=1)[0], str(error)
        if section in text:
            raise
        known = text.partition(":")[0] in {f.name for f in fields(cls)}  # type: ignore[arg-type]
        raise RecipeError(f"{name}.{text}" if known else f"{name}: {text}") from error


def _check_keys(value: Any, cls: type, prefix: str) -> None:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{prefix.rstrip('.') or 'recipe'}: expected a mapping of keys, got {value!r}")
    known = [f.name for f in fields(cls)]
    for key in value:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            raise RecipeError(f"unknown key '{prefix}{key}'; {hint}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
