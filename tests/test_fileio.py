"""What goes into files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.fileio import check_can_be_folder, check_replaces, json_value, map_array


def test_json_has_no_infinities() -> None:
    given = {
        "loss": math.nan,
        "all": [1.5, math.inf, (np.float32(2.5), np.int64(3))],
        "done": np.bool_(True),
        "name": "x",
    }
    text = json.dumps(json_value(given), allow_nan=False)
    assert json.loads(text) == {"loss": None, "all": [1.5, None, [2.5, 3]], "done": True, "name": "x"}


@pytest.mark.parametrize("shape", ["(1180591620717411303424,)", "(True,)", "{[1]: 2}", "(4,"])
def test_a_header_of_no_array_is_a_value_error(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 16)
    with pytest.raises(ValueError, match=r"header|shape|Header"):
        map_array(path)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc, in which nobody can write")
def test_what_cannot_be_written_is_named_before_any_work() -> None:
    with pytest.raises(OSError, match="--output /proc/self/a/b: cannot write into /proc/"):
        check_can_be_folder("--output", Path("/proc/self/a/b"))
    with pytest.raises(OSError, match="--output /proc/self/task: cannot write into /proc/self/task: "):
        check_can_be_folder("--output", Path("/proc/self/task"))
    with pytest.raises(OSError, match=r"--json /proc/self/x\.json: cannot write into /proc/self"):
        check_replaces("--json", Path("/proc/self/x.json"), b"{")
