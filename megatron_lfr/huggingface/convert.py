"""`megatron-lfr convert`: conversion to and from Hugging Face folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro

from megatron_lfr.huggingface.export import ToHF, export
from megatron_lfr.huggingface.from_peft import FromPeft, load_adapters
from megatron_lfr.huggingface.load import FromHF, load
from megatron_lfr.huggingface.to_peft import ToPeft, export_adapters


def main(argv: Sequence[str]) -> int:
    """Run `megatron-lfr convert`; returns the exit code."""
    options = tyro.cli(
        Annotated[ToHF, tyro.conf.subcommand("to-hf")]
        | Annotated[FromHF, tyro.conf.subcommand("from-hf")]
        | Annotated[ToPeft, tyro.conf.subcommand("to-peft")]
        | Annotated[FromPeft, tyro.conf.subcommand("from-peft")],
        args=list(argv),
        prog="megatron-lfr convert",
        description="Turn a run's weights into a Hugging Face folder (to-hf), or such a folder into a run (from-hf); "
        "the same for adapters and folders of the peft package (to-peft, from-peft).",
    )
    if isinstance(options, ToHF):
        export(options)
    elif isinstance(options, FromHF):
        load(options)
    elif isinstance(options, ToPeft):
        export_adapters(options)
    else:
        load_adapters(options)
    return 0
