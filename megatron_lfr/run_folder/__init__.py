"""One run on disk: what is in its folder, who may write to it, and how it is read. No PyTorch."""

from megatron_lfr.run_folder.corpus import Corpus, find_corpus, open_corpus
from megatron_lfr.run_folder.folder import RunFolder

__all__ = ["Corpus", "RunFolder", "find_corpus", "open_corpus"]
