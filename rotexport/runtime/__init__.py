"""Running what a build made: graphs in ONNX Runtime, and sessions that generate text."""

from rotexport.runtime.model import OnnxModel
from rotexport.runtime.session import Session

__all__ = ["OnnxModel", "Session"]
