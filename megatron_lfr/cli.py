"""megatron-lfr: preprocess a corpus, train on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

USAGE = """usage: megatron-lfr COMMAND [flags]     (megatron-lfr COMMAND --help lists a command's flags)

  preprocess   turn text (JSONL, .txt, Parquet) into an indexed corpus (.bin/.idx), one prefix for each domain
  merge        join indexed corpora to one
  train        pretrain a Llama with Learn-Focus-Review; continue a run that was stopped
"""


def _preprocess(argv: Sequence[str]) -> int:
    import tyro

    from megatron_lfr.data.preprocess import PreprocessConfig, run

    run(tyro.cli(PreprocessConfig, args=list(argv), prog="megatron-lfr preprocess"))
    return 0


def _merge(argv: Sequence[str]) -> int:
    import tyro

    from megatron_lfr.data.merge import MergeConfig, merge

    summary = merge(tyro.cli(MergeConfig, args=list(argv), prog="megatron-lfr merge"))
    print(f"{summary.prefix}: {summary.documents} documents, {summary.tokens} tokens")
    return 0


def _train(argv: Sequence[str]) -> int:
    from megatron_lfr.training.run import main as train

    return train(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"preprocess": _preprocess, "merge": _merge, "train": _train}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input, or a loss that stays not finite, ends with one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"megatron-lfr: unknown command {words[0]!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[words[0]](words[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"megatron-lfr {words[0]}: error: {rank}{error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
