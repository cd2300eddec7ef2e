"""megatron-lfr: preprocess a corpus, train on it, report on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

USAGE = """usage: megatron-lfr COMMAND [flags]     (megatron-lfr COMMAND --help lists a command's flags)

  preprocess   turn text (JSONL, .txt, Parquet) into an indexed corpus (.bin/.idx), one prefix for each domain
  merge        join indexed corpora to one
  train        pretrain a Llama with Learn-Focus-Review; continue a run that was stopped
  evaluate     losses of a run's model on a corpus, and its results on tasks
  inspect      the blocks, documents and text behind a step; the history of a block or a domain
  report       show a run, or several side by side, on one HTML page
  convert      a run's weights to a Hugging Face folder (to-hf), or such a folder to a run (from-hf)
  estimate     memory, tokens, steps and FLOPs of a configuration, without running it
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
    if not summary.has_sidecar:
        print(
            "merge: not every input says which tokenizer made it (.meta), so the output does not either",
            file=sys.stderr,
        )
    return 0


def _train(argv: Sequence[str]) -> int:
    from megatron_lfr.training.run import main as train

    return train(argv)


def _evaluate(argv: Sequence[str]) -> int:
    from megatron_lfr.evaluation.command import main as evaluate

    return evaluate(argv, int(os.environ.get("WORLD_SIZE", "1")))


def _inspect(argv: Sequence[str]) -> int:
    from megatron_lfr.inspection.command import main as inspect

    return inspect(argv)


def _report(argv: Sequence[str]) -> int:
    import tyro

    from megatron_lfr.report.command import ReportConfig, write_report

    path = write_report(tyro.cli(ReportConfig, args=list(argv), prog="megatron-lfr report"))
    print(f"report: {path}")
    return 0


def _convert(argv: Sequence[str]) -> int:
    from megatron_lfr.huggingface.convert import main as convert

    return convert(argv)


def _estimate(argv: Sequence[str]) -> int:
    from megatron_lfr.estimate.command import main as estimate

    return estimate(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "preprocess": _preprocess,
    "merge": _merge,
    "train": _train,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "report": _report,
    "convert": _convert,
    "estimate": _estimate,
}


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
