"""Checkpoints to and from Hugging Face's folders: safetensors and JSON, one weight in memory at a time."""
