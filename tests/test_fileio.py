"""What goes into files."""

from __future__ import annotations

import json
import math

import numpy as np

from megatron_lfr.fileio import json_value


def test_json_has_no_infinities() -> None:
    given = {
        "loss": math.nan,
        "all": [1.5, math.inf, (np.float32(2.5), np.int64(3))],
        "done": np.bool_(True),
        "name": "x",
    }
    text = json.dumps(json_value(given), allow_nan=False)
    assert json.loads(text) == {"loss": None, "all": [1.5, None, [2.5, 3]], "done": True, "name": "x"}
