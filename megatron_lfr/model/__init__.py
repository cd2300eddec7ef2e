"""Models, written once for every parallel layout."""

from megatron_lfr.model.config import MODEL_PRESETS, ModelConfig
from megatron_lfr.model.llama import Llama

__all__ = ["MODEL_PRESETS", "Llama", "ModelConfig"]
