"""Conversion of checkpoints to and from Hugging Face folders: safetensors and JSON, one weight in memory at a time."""
