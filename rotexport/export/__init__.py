"""PyTorch -> canonical ONNX."""

from rotexport.export.pipeline import export

__all__ = ["export"]
