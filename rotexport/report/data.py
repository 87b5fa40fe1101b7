"""What the report of a build holds, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from rotexport.metrics import Comparison
from rotexport.progress import StageRecord
from rotexport.streaming.evaluate import StreamComparison
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
class BodyCount:
    """Nodes of ours that run as their operators' bodies, because no kernel of the library takes them."""

    operator: str
    reason: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class EngineSummary:
    """One engine file."""

    target: str
    gpu: str
    file: str
    size: int
    seconds: float
    kernels: tuple[KernelCount, ...] = ()
    bodies: tuple[BodyCount, ...] = ()


@dataclass(frozen=True)
class BlockSummary:
    """One block whose weights were chosen on calibration text.

    `error` is its output's, over all blocks up to it, relative to the float model's; `losses` of its products
    by site and step (`rounding`, `gptq`, ...), each relative to the power of the product.
    """

    block: int
    error: float
    losses: dict[str, dict[str, float]]


@dataclass(frozen=True)
class StepSummary:
    """After one step of a build, each block's error when it alone is quantized, relative to its output."""

    step: str
    blocks: tuple[float, ...]


@dataclass(frozen=True)
class ClipSummary:
    """The clip found for the input of some sites, and their products' relative error before and with it.

    `search` counts searches: 1 before weights were chosen, 2 behind them.
    """

    search: int
    sites: str
    clip: float
    before: float
    after: float


@dataclass(frozen=True)
class SiteSensitivity:
    """Error in a block's output when one site alone is quantized, relative to the output's power.

    `wide` is with its weight kept wider; `kept_wide` says whether it was.
    """

    site: str
    narrow: float
    wide: float
    kept_wide: bool


@dataclass(frozen=True)
class BuildReport:
    """Everything that the page shows.

    Attributes:
        files: sizes in bytes of what the build wrote, by name.
        inputs: SHA-256 of the files that went in, by name.
        recipe_text: the resolved recipe as YAML.
        text: what the tokens of the proof were taken from, in words.
        stream: a long text read as one stream, once somebody asked for it.
        cache_bytes_per_token: by which a token lets the key/value cache of all layers grow.
        cache_bytes: of a bounded cache, per row, however long the stream.

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
    cache_bytes: int | None = None
    stages: tuple[StageRecord, ...] = ()
    components: tuple[ComponentSummary, ...] = ()
    transforms: tuple[TransformSummary, ...] = ()
    passes: tuple[PassSummary, ...] = ()
    outliers: tuple[SiteOutliers, ...] = ()
    weights: tuple[BlockSummary, ...] = ()
    steps: tuple[StepSummary, ...] = ()
    clips: tuple[ClipSummary, ...] = ()
    sensitivities: tuple[SiteSensitivity, ...] = ()
    proof: Proof | None = None
    stream: StreamComparison | None = None
    engines: tuple[EngineSummary, ...] = ()
    notes: tuple[str, ...] = ()
