from support.tiny_corpus import corpus

__all__ = ["corpus"]
