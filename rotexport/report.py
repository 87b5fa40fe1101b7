"""The report of a build: what it holds, as data (`report.json`) and as a page (`report.html`)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from rotexport.errors import OutputError
from rotexport.metrics import Comparison
from rotexport.progress import StageRecord
from rotexport.report_page import render
from rotexport.serialize import from_plain, to_plain
from rotexport.validate import Proof


@dataclass(frozen=True)
class ModelSummary:
    """The model that went in; `architecture` is its type in its configuration."""

    name: str
    source: str
    architecture: str
    parameters: int
    blocks: int
    width: int
    vocabulary: int


@dataclass(frozen=True)
class ComponentSummary:
    """Axes of activations that share one basis: free to rotate, or pinned by what `pins` says."""

    title: str
    size: int
    tensors: int
    pins: tuple[str, ...] = ()


@dataclass(frozen=True)
class TransformSummary:
    """Where one transform went: `where` is folded, online or refused, `site` `block.role` or `residual`."""

    rotation: str
    site: str
    where: str
    transform: str
    reason: str = ""


@dataclass(frozen=True)
class PassSummary:
    """One pass; `comparison` of the logits before and after it is None where it was not validated."""

    name: str
    preserves: str
    changed: int
    notes: tuple[str, ...] = ()
    comparison: Comparison | None = None


@dataclass(frozen=True)
class SiteOutliers:
    """How uneven a linear's input is: largest channel's maximum over the median channel's, and kurtosis.

    The figures after rotation are None where nothing was rotated.
    """

    site: str
    ratio_before: float
    kurtosis_before: float
    ratio_after: float | None = None
    kurtosis_after: float | None = None


@dataclass(frozen=True)
class KernelCount:
    """How many MatMuls of a role (`query`, `down`, ...) became which kernel."""

    role: str
    kernel: str
    count: int


@dataclass(frozen=True)
class EngineSummary:
    """One engine file."""

    target: str
    gpu: str
    file: str
    size: int
    seconds: float
    kernels: tuple[KernelCount, ...] = ()


@dataclass(frozen=True)
class BuildReport:
    """Everything that the page shows.

    Attributes:
        files: sizes in bytes of what the build wrote, by name.
        inputs: SHA-256 of the files that went in, by name.
        recipe_text: the resolved recipe as YAML.
        text: what the tokens of the proof were taken from, in words.
        cache_bytes_per_token: of the key/value cache, all layers.

    """

    model: ModelSummary
    recipe: str
    description: str
    recipe_text: str
    target: str
    gpus: tuple[str, ...] = ()
    text: str = ""
    created: str = ""
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    cache_bytes_per_token: int | None = None
    stages: tuple[StageRecord, ...] = ()
    components: tuple[ComponentSummary, ...] = ()
    transforms: tuple[TransformSummary, ...] = ()
    passes: tuple[PassSummary, ...] = ()
    outliers: tuple[SiteOutliers, ...] = ()
    proof: Proof | None = None
    engines: tuple[EngineSummary, ...] = ()
    notes: tuple[str, ...] = ()


def write_report(report: BuildReport, directory: Path) -> None:
    """Write `report.json` and `report.html` into a build's directory.

    Raises:
        OutputError: the directory cannot be written.

    """
    text = json.dumps(to_plain(report), indent=1, allow_nan=False)
    for name, content in (("report.json", text + "\n"), ("report.html", render(report))):
        path = directory / name
        temporary = path.with_suffix(path.suffix + ".partial")
        try:
            temporary.write_text(content, encoding="utf-8")
            temporary.rename(path)
        except OSError as error:
            raise OutputError(f"cannot write '{path}': {error.strerror}") from error


def read_report(directory: Path) -> BuildReport:
    """Read what `write_report` wrote.

    Raises:
        OutputError: there is no report, or it is not one of this version.

    """
    path = directory / "report.json"
    try:
        return from_plain(BuildReport, json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise OutputError(
            f"cannot read '{path}': {error.strerror}; is this the directory of a build?"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(
            f"'{path}' is not a report of this version of rotexport ({error}); build again"
        ) from error
