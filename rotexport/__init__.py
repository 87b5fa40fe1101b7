"""rotexport: PyTorch language models to rotation-quantized ONNX graphs and TensorRT engines."""

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotexport.build import BuildOptions, build

__all__ = ["BuildOptions", "__version__", "build"]
__version__ = version("rotexport")


class _Package(ModuleType):
    """Keeps `rotexport.build` the function: importing a submodule would put the module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.build if name == "build" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import: only what needs it should pay.
    if name in ("build", "BuildOptions"):
        return getattr(import_module("rotexport.build"), name)
    raise AttributeError(f"module 'rotexport' has no attribute '{name}'")
