"""`python -m megatron_lfr`, as torchrun starts it."""

import sys

from megatron_lfr.cli import main

sys.exit(main())
