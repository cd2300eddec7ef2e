"""The command's entry: `megatron-lfr`, and `python -m megatron_lfr`, as torchrun starts it."""

import _signal  # type: ignore[import-not-found]  # the interpreter's own, which is loaded already; `signal` takes a while

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # until `main` listens, Ctrl-C ends the process without a word

import sys

from megatron_lfr.cli import main

if __name__ == "__main__":
    sys.exit(main())
