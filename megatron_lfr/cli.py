"""The command `megatron-lfr`: preprocess a corpus, train on it, report on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from megatron_lfr import __version__, interrupt, output
from megatron_lfr.fileio import describe

USAGE = """usage: megatron-lfr COMMAND [flags]     (megatron-lfr COMMAND --help lists a command's flags)
       megatron-lfr --version

  tokenizer    train a byte-level BPE tokenizer on text
  preprocess   turn text (JSONL, .txt, Parquet) into an indexed corpus (.bin/.idx), one prefix for each domain
  merge        join indexed corpora into one
  commonness   find exact and near copies in a corpus, and what in it is unlike text
  train        pretrain a decoder, by default a Llama, with Learn-Focus-Review, or continue a run that was stopped
  branch       begin a run that goes on from a saved step of another one
  extend       give a run one more segment: new blocks, phases, steps or another batch size
  evaluate     compute the losses of a run's model on a corpus, and its results on tasks
  inspect      show the blocks, documents and text behind a step, or the history of a block or a domain
  report       show a run, or several side by side, on one HTML page
  study        compare ways of choosing data at equal compute: arms, seeds, sizes; one page
  convert      turn a run's weights into a Hugging Face folder (to-hf), or such a folder into a run (from-hf)
  estimate     estimate memory, tokens, steps and FLOPs of a configuration, without running it
  benchmark    measure the speed of a configuration, and where the time of its steps goes
  doctor       check the ranks of an allocation: versions, devices, clocks, network, the run folder's file system
"""


def _tokenizer(argv: Sequence[str]) -> int:
    import tyro

    from megatron_lfr.data.preprocess.train_tokenizer import TokenizerConfig, train_tokenizer

    config = tyro.cli(TokenizerConfig, args=list(argv), prog="megatron-lfr tokenizer")
    print(f"{config.output}: {train_tokenizer(config)} tokens")
    return 0


def _preprocess(argv: Sequence[str]) -> int:
    import tyro

    from megatron_lfr.data.preprocess.command import PreprocessConfig, run

    run(tyro.cli(PreprocessConfig, args=list(argv), prog="megatron-lfr preprocess"))
    return 0


def _merge(argv: Sequence[str]) -> int:
    import tyro

    from megatron_lfr.data.preprocess.merge import MergeConfig, merge

    summary = merge(tyro.cli(MergeConfig, args=list(argv), prog="megatron-lfr merge"))
    print(f"{summary.prefix}: {summary.documents} documents, {summary.tokens} tokens")
    if not summary.has_sidecar:
        print(
            "merge: not every input says which tokenizer made it (.meta), so the output does not either",
            file=sys.stderr,
        )
    return 0


def _commonness(argv: Sequence[str]) -> int:
    from megatron_lfr.commonness.command import main as commonness

    return commonness(argv)


def _train(argv: Sequence[str]) -> int:
    from megatron_lfr.training.run import main as train

    return train(argv)


def _branch(argv: Sequence[str]) -> int:
    from megatron_lfr.versions.command import main as branch

    return branch(argv)


def _extend(argv: Sequence[str]) -> int:
    from megatron_lfr.versions.extend_command import main as extend

    return extend(argv)


def _evaluate(argv: Sequence[str]) -> int:
    from megatron_lfr.evaluation.command import main as evaluate
    from megatron_lfr.parallel.launchers import adopt_launcher

    return evaluate(argv, adopt_launcher().world_size)


def _inspect(argv: Sequence[str]) -> int:
    from megatron_lfr.inspection.command import main as inspect

    return inspect(argv)


def _report(argv: Sequence[str]) -> int:
    import tyro

    from megatron_lfr.report.command import ReportConfig, write_report

    path = write_report(tyro.cli(ReportConfig, args=list(argv), prog="megatron-lfr report"))
    print(f"report: {path}")
    return 0


def _study(argv: Sequence[str]) -> int:
    from megatron_lfr.study.command import main as study

    return study(argv)


def _convert(argv: Sequence[str]) -> int:
    from megatron_lfr.huggingface.convert import main as convert

    return convert(argv)


def _estimate(argv: Sequence[str]) -> int:
    from megatron_lfr.estimate.command import main as estimate

    return estimate(argv)


def _benchmark(argv: Sequence[str]) -> int:
    from megatron_lfr.benchmark.command import main as benchmark

    return benchmark(argv)


def _doctor(argv: Sequence[str]) -> int:
    from megatron_lfr.doctor.command import main as doctor

    return doctor(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "tokenizer": _tokenizer,
    "preprocess": _preprocess,
    "merge": _merge,
    "commonness": _commonness,
    "train": _train,
    "branch": _branch,
    "extend": _extend,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "report": _report,
    "study": _study,
    "convert": _convert,
    "estimate": _estimate,
    "benchmark": _benchmark,
    "doctor": _doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Bad input, or a loss that stays not finite, ends it with one line on
    stderr and code 2; Ctrl-C ends it with one line and code 130, unless it leaves `train` time to save."""
    output.prepare()
    with interrupt.interruptible():
        try:
            code = _run(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
            return code
        except OSError as error:  # from the flush: `_run` reports those of a command
            print(f"megatron-lfr: error: {describe(error)}", file=sys.stderr)
            return 2


def _run(words: list[str]) -> int:
    words = _without_local_rank(words)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"megatron-lfr {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"megatron-lfr: unknown command {words[0]!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        for word in words:
            if not output.is_utf8(word):
                raise ValueError(f"{word}: is not UTF-8; the names of all files must be")
        return COMMANDS[words[0]](words[1:])
    except BaseException as error:
        is_one_of_many, rank = os.environ.get("WORLD_SIZE", "1") != "1", os.environ.get("RANK", "0")
        if interrupt.happened() or isinstance(error, KeyboardInterrupt):
            if rank == "0" and interrupt.OUTCOME not in os.environ:  # one line for all ranks
                _print_end(words[0], "interrupted", error)
            return interrupt.EXIT_CODE
        if not isinstance(error, (ValueError, OSError, FloatingPointError)):
            raise
        _print_end(words[0], f"error: {f'[rank {rank}] ' if is_one_of_many else ''}{describe(error)}", error)
        return 2


def _without_local_rank(words: list[str]) -> list[str]:
    """Return the command line without the `--local_rank=N` that DeepSpeed and older launchers add, in front of the
    command or behind it: the environment says the same."""
    rest: list[str] = []
    is_value = False
    for word in words:
        if is_value and word.removeprefix("-").isdecimal():
            is_value = False
            continue
        flag, equals, _ = word.replace("_", "-").partition("=")
        is_flag = flag == "--local-rank"
        is_value = is_flag and not equals
        if not is_flag:
            rest.append(word)
    return rest


def _print_end(command: str, text: str, error: BaseException) -> None:
    """Print one line on stderr (each error of a list gets a line of its own), with the notes added to the error."""
    message = "; ".join([f"megatron-lfr {command}: {text}", *getattr(error, "__notes__", [])])
    print("\n".join(map(output.visible, message.split("\n"))), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
