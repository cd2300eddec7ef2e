"""Models, written once for every parallel layout."""

from megatron_lfr.model.config import MODEL_PRESETS, ModelConfig
from megatron_lfr.model.decoder import Decoder

__all__ = ["MODEL_PRESETS", "Decoder", "ModelConfig"]
