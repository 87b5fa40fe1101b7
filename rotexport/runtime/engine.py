"""A plan of TensorRT or TensorRT-RTX on the GPU that it was built for.

The library reads and writes device memory that PyTorch owns. Outputs that a plugin writes in place share
their input's memory; all others get memory of their own, since an engine may write before it has read.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from rotexport.errors import TargetError, ValidationError
from rotexport.output import read_manifest
from rotexport.passes.lasting_positions import LAST_POSITION
from rotexport.runtime.bounded import call_inputs, prompt_chooses
from rotexport.runtime.cached import CachedGraph
from rotexport.targets.capabilities import MODULES

if TYPE_CHECKING:
    from rotexport.graph.weights import Array

TYPES: Final = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
}


class Plan:
    """A deserialized engine with its context.

    Args:
        path: the `.plan` file, named `<target>-<gpu>.plan`.
        library: the module `tensorrt_rtx` or `tensorrt`.
        device: where tensors live.

    Raises:
        TargetError: the library cannot read the plan.

    """

    def __init__(self, path: Path, library: Any, device: torch.device) -> None:
        self.path = path
        self._device = device
        self._somewhere = torch.zeros(1, device=device)
        self._runtime = library.Runtime(library.Logger(library.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise TargetError(
                f"{library.__name__} {library.__version__} cannot read '{path}': it was built by another "
                "version, or for another GPU; build it again here"
            )
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode = library.TensorIOMode.INPUT
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == mode]
        self.outputs = [name for name in names if name not in self.inputs]

    def most(self, name: str) -> tuple[int, ...]:
        """Return the largest shape of an input that any profile takes."""
        profiles = range(self._engine.num_optimization_profiles)
        return max(tuple(self._engine.get_tensor_profile_shape(name, index)[2]) for index in profiles)

    def tensor(self, name: str, values: Array | Sequence[int]) -> torch.Tensor:
        """Return values, or zeros of a shape, on the device and in the type of a tensor of the engine."""
        kind = TYPES[self._engine.get_tensor_dtype(name).name]
        if isinstance(values, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(values)).view(kind).to(self._device)
        return torch.zeros(tuple(values), dtype=kind, device=self._device)

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run once.

        Raises:
            ValidationError: no profile of the engine takes shapes as large as these.
            TargetError: the engine failed.

        """
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
        self._context.set_optimization_profile_async(self._profile(feeds), stream)
        for name, tensor in feeds.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, self._address(tensor))
        found = {}
        for name in self.outputs:
            shared = self._engine.get_aliased_input_tensor(name)
            shape = self._context.get_tensor_shape(name)
            found[name] = feeds[shared] if shared else self.tensor(name, tuple(shape))
            self._context.set_tensor_address(name, self._address(found[name]))
        if not self._context.execute_async_v3(stream):
            raise TargetError(f"'{self.path}' failed to run; its library's log says why")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return found

    def _address(self, tensor: torch.Tensor) -> int:
        """Return where a tensor is; an engine wants some address of an empty one, too."""
        pointer: int = tensor.data_ptr() or self._somewhere.data_ptr()
        return pointer

    def _profile(self, feeds: Mapping[str, torch.Tensor]) -> int:
        """Return the last profile that takes these shapes: single steps come after prompts."""
        refused = ""
        for index in reversed(range(self._engine.num_optimization_profiles)):
            refused = self._refusal(index, feeds)
            if not refused:
                return index
        raise ValidationError(
            f"'{self.path}' does not take {refused}; build it with a larger --max-length or --max-batch, "
            "or with attention.kind: streaming"
        )

    def _refusal(self, profile: int, feeds: Mapping[str, torch.Tensor]) -> str:
        for name, tensor in feeds.items():
            least, _, most = self._engine.get_tensor_profile_shape(name, profile)
            for size, low, high in zip(tensor.shape, least, most, strict=True):
                if not low <= size <= high:
                    return f"a dimension of {size} in '{name}', which may be {low} to {high}"
        return ""


class EngineGraph(CachedGraph):
    """An engine with its cache on the device, bounded or growing as its graph was."""

    longer = ", or build with attention.kind: streaming"

    def __init__(self, plan: Plan) -> None:
        self.path = plan.path
        self._plan = plan
        self._bounded = "past_length" in plan.inputs
        self._ports = [name for name in plan.inputs if name.startswith(("cache.", "past_key_values."))]
        windows = [plan.most(name)[2] for name in self._ports if name.endswith(".window_key")]
        self.call_tokens = min([plan.most("input_ids")[1], *windows])
        self.whole_prompt = prompt_chooses(self._ports)
        self.last_position = LAST_POSITION  # a growing cache ends earlier: with its profile
        self._cache = self._empty_cache()

    def run(self, tokens: Array, logits_of: Sequence[int], observed: Sequence[str] = ()) -> list[Array]:
        """Read tokens in one call; see `CachedGraph.run`. Engines show no inner tensors."""
        if observed:
            raise ValidationError(f"'{self.path}' is an engine: it does not show '{observed[0]}'")
        if self._bounded:
            values = call_inputs(tokens, self.length, logits_of)
        else:
            values = self._growing_inputs(tokens)
        feeds = {name: self._plan.tensor(name, value) for name, value in values.items()}
        found = self._plan.run({**feeds, **self._cache})
        logits: Array = found.pop("logits")[0].float().cpu().numpy()
        prefix = "cache." if self._bounded else "past_key_values."
        self._cache = {name.replace("present.", prefix, 1): value for name, value in found.items()}
        self.length += len(tokens)
        return [logits if self._bounded else logits[np.asarray(logits_of)]]

    def reset(self) -> None:
        """Forget the stream."""
        self.length = 0
        self._cache = self._empty_cache()

    @property
    def cache_bytes(self) -> int:
        """Bytes that the cache takes now."""
        return sum(tensor.nbytes for tensor in self._cache.values())

    def state(self) -> dict[str, Array]:
        """Return the cache by name, as bytes: NumPy has no bfloat16."""
        return {name: tensor.view(torch.int8).cpu().numpy() for name, tensor in self._cache.items()}

    def resume(self, state: dict[str, Array], length: int) -> None:
        """Take up a cache that `state` returned after `length` tokens."""
        self._cache = {name: self._plan.tensor(name, values) for name, values in state.items()}
        self.length = length

    def _empty_cache(self) -> dict[str, torch.Tensor]:
        """A bounded cache starts with zeros, a growing one without tokens, which are its third axis."""
        shapes = {name: self._plan.most(name) for name in self._ports}
        return {
            name: self._plan.tensor(name, (1, heads, slots if self._bounded else 0, *sizes))
            for name, (_, heads, slots, *sizes) in shapes.items()
        }

    def _growing_inputs(self, tokens: Array) -> dict[str, Array]:
        total = self.length + len(tokens)
        return {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self.length, total, dtype=np.int64)[None],
        }


def has_engine(folder: Path) -> bool:
    """Whether a build has an engine for the GPU of this machine."""
    gpu = _gpu()
    return gpu is not None and any((folder / "engines").glob(f"*-{gpu}.plan"))


def open_engine(folder: Path, plugins: Path | None = None) -> EngineGraph:
    """Open the engine of a build for the GPU of this machine; `plugins` is the library it was built with.

    Raises:
        TargetError: there is no GPU, no engine for it, or no library of the version that built it.

    """
    plans = sorted((folder / "engines").glob("*.plan"))
    if not plans:
        raise TargetError(
            f"'{folder}' has no engines; build with --target tensorrt-rtx --gpu, or run on ONNX Runtime"
        )
    gpu = _gpu()
    if gpu is None:
        raise TargetError("engines need a GPU, and PyTorch finds none; run on ONNX Runtime")
    here = [plan for plan in plans if plan.stem.endswith(f"-{gpu}")]
    if not here:
        names = ", ".join(plan.stem for plan in plans)
        raise TargetError(f"'{folder}' has engines {names}, none for this machine's {gpu}; build one for it")
    library = load_library(here[0].stem.removesuffix(f"-{gpu}"), read_manifest(folder))
    if plugins is not None and library.get_plugin_registry().load_library(str(plugins)) is None:
        raise TargetError(f"{library.__name__} refuses the plugins '{plugins}'; build them for its version")
    return EngineGraph(Plan(here[0], library, torch.device("cuda")))


def load_library(target: str, manifest: Mapping[str, Any]) -> Any:
    """Return the module that runs a target's engines, of the version that built them.

    Raises:
        TargetError: it is not installed, or its version is another.

    """
    built = manifest["versions"].get(target)
    try:
        library = importlib.import_module(MODULES[target])
    except ImportError:
        raise TargetError(f"the engine needs {target} {built}: pip install '{target}=={built}'") from None
    if library.__version__ != built:
        raise TargetError(
            f"the engine was built by {target} {built}, and {library.__version__} is installed; "
            f"pip install '{target}=={built}', or build again"
        )
    return library


def _gpu() -> str | None:
    """Return the compute capability of this machine's GPU as targets name it (`sm89`)."""
    if not torch.cuda.is_available():
        return None
    return "sm{}{}".format(*torch.cuda.get_device_capability())
