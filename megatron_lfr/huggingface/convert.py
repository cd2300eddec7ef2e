"""`megatron-lfr convert`: conversion to and from Hugging Face folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro

from megatron_lfr.huggingface.export import ToHF, export
from megatron_lfr.huggingface.load import FromHF, load


def main(argv: Sequence[str]) -> int:
    """Run `megatron-lfr convert`; returns the exit code."""
    options = tyro.cli(
        Annotated[ToHF, tyro.conf.subcommand("to-hf")] | Annotated[FromHF, tyro.conf.subcommand("from-hf")],
        args=list(argv),
        prog="megatron-lfr convert",
        description="Turn a run's weights into a Hugging Face folder (to-hf), or such a folder into a run (from-hf).",
    )
    if isinstance(options, ToHF):
        export(options)
    else:
        load(options)
    return 0
