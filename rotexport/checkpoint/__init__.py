"""Reading models: Hugging Face directories and hub ids, GGUF files, loaded transformers models."""

from rotexport.checkpoint.checkpoint import Checkpoint
from rotexport.checkpoint.opening import open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
