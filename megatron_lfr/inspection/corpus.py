"""What stands in a run's blocks."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lfr.data.config import recorded_prefixes
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.corpus.documents import check_tokenizer
from megatron_lfr.data.corpus.tokenizer import recorded_tokenizer
from megatron_lfr.lfr.analysis import Run
from megatron_lfr.output import visible


class Corpus:
    """A run's training blocks and its tokenizer, from where config.yaml says, or from where they lie now.

    ValueError where the corpus is not the one that the run was trained on; FileNotFoundError where it is not there.
    """

    def __init__(self, run: Run, data_path: Sequence[str], tokenizer_model: str | None) -> None:
        config = run.config
        try:
            paths, split = list(data_path) or recorded_prefixes(config), config["split"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{run.folder}: no corpus is known ({error}); --chars 0 goes without it") from None
        dataset = BlockDataset(paths, run.plan.seq_length, str(split))
        if tuple(dataset.digests()) != run.corpus:
            raise ValueError(f"--data-path {' '.join(map(str, paths))}: not the corpus that {run.folder} trained on")
        self.source = dataset.train
        self._tokenizer = recorded_tokenizer(config, tokenizer_model)
        check_tokenizer(self._tokenizer, dataset.datasets)

    def domain(self, name: str) -> tuple[int, int]:
        """(first, one behind the last) block of a domain. ValueError with the legal names."""
        domains = self.source.domains
        if name not in domains:
            raise ValueError(f"--domain {name}: choose from {', '.join(map(visible, domains))}")
        index = domains.index(name)
        return int(self.source.domain_starts[index]), int(self.source.domain_starts[index + 1])

    def place(self, block: int) -> str:
        """A block's domain, and its documents as numbered within the domain's prefix."""
        domain = self.source.domains[int(self.source.domain_of([block])[0])]
        documents = self.source.documents_of(block)
        first, last = documents[0], documents[-1]
        return f"{visible(domain)}, document{f's {first} to {last}' if last > first else f' {first}'}"

    def text(self, block: int, chars: int) -> str:
        """The first `chars` characters of a block, safe to print; its token ids where the run has no tokenizer."""
        tokens = self.source.read([block])[0].tolist()
        if self._tokenizer is None:
            return " ".join(map(str, tokens))[:chars]
        return visible(self._tokenizer.decode(tokens)[:chars])
