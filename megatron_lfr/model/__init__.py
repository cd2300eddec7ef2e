"""Models, written once for every parallel layout."""

from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.decoder import Decoder
from megatron_lfr.model.presets import MODEL_PRESETS

__all__ = ["MODEL_PRESETS", "Decoder", "ModelConfig"]
