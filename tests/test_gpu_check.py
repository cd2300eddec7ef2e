"""tools/gpu_check.sh without a GPU: its parts, what it does with those that fail or hang, and its table."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import benchmark_kernels
import benchmark_layers
import benchmark_training
import gpu_parts
import gpu_runs
import gpu_table
import pytest
import torch

from megatron_lfr.config import parse_run_config
from megatron_lfr.model import MODEL_PRESETS
from megatron_lfr.model.fused import LayerKernels
from megatron_lfr.parallel import session
from megatron_lfr.training.run import train

ROOT = Path(__file__).parent.parent


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run_parts(
    parts: list[gpu_parts.Part], out: Path, monkeypatch: pytest.MonkeyPatch, card: str = "", **more: Any
) -> Any:
    """Return (exit code, results by name)."""
    monkeypatch.setattr(gpu_parts, "PARTS", {"check": parts})
    monkeypatch.setattr(gpu_parts, "find_card", lambda: card)
    flags = [word for name, value in more.items() for word in (f"--{name}", str(value))]
    code = gpu_parts.main(["check", str(out), *flags])
    return code, json.loads((out / "results.json").read_text())["parts"]


def test_every_part_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = "import sys; open(sys.argv[1], 'w').write('{\"a\": 1}'); print('fine')"
    hang = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('was here'); raise SystemExit(5)"
    parts = [
        gpu_parts.Part("first", 60, [*python(write), "{json}"], "not this", alone=True),
        gpu_parts.Part("fails", 60, python("print('because'); raise SystemExit(1)"), ""),
        gpu_parts.Part("hangs", 1, python(hang), ""),
        gpu_parts.Part("needs", 60, python("print('needs a GPU: why'); raise SystemExit(3)"), ""),
        gpu_parts.Part("last", 60, python("print('ran')"), "", alone=True),
    ]
    code, results = run_parts(parts, tmp_path, monkeypatch, card="Toy")
    assert code == 1
    states = {name: part["state"] for name, part in results.items()}
    assert states == {
        "first": "passed", "fails": "failed", "hangs": "interrupted", "needs": "skipped", "last": "passed",
    }  # fmt: skip
    assert results["first"]["figures"] == {"a": 1}
    assert (results["fails"]["why"], results["needs"]["why"]) == ("because", "needs a GPU: why")
    assert "was here" in (tmp_path / "logs.txt").read_text()
    table = (tmp_path / "table.txt").read_text()
    assert "check on Toy" in table
    assert all(name in table for name in results)


def test_without_a_gpu_or_time_a_part_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        gpu_parts.Part("gpu", 60, python("1 / 0"), "there is none"),
        gpu_parts.Part("toy", 60, python("1 / 0"), python("print('a toy')")),
    ]
    code, results = run_parts(parts, tmp_path, monkeypatch)
    assert code == 0
    assert results["gpu"]["why"] == "no CUDA device: there is none"
    assert results["toy"]["state"] == "passed"
    _, results = run_parts(parts, tmp_path, monkeypatch, seconds=1, only="toy")
    assert {name: part["why"] for name, part in results.items()} == {"toy": "no time left"}


def test_the_parts_name_what_there_is() -> None:
    """Files, flags and checks of every command, on a GPU and without."""
    seen = set()
    for part in [part for parts in gpu_parts.PARTS.values() for part in parts]:
        for command in (part.command, part.without_gpu):
            if isinstance(command, str):
                assert command
                continue
            files = [word for word in command if word.endswith((".py", ".sh"))]
            assert all((ROOT / file).exists() for file in files)
            seen |= set(files)
            script, *flags = command[1:]
            if script == "tools/gpu_runs.py":
                assert flags[0] in gpu_runs.CHECKS
            if script == "tools/benchmark_training.py":
                assert benchmark_training.parse(flags)
    assert seen >= {
        "tools/benchmark_kernels.py",
        "tools/profile_kernels.py",
        "tests/kernels/test_cross_entropy_mutants.py",
    }
    assert gpu_parts.SECONDS + gpu_parts.GRACE_SECONDS < 8 * 60


def test_the_table_has_the_benchmark() -> None:
    parts = {"forward": {"mean": 0.1}, "step": {"mean": 0.3}}
    figures = {
        "tokens_per_second": 5e4,
        "flops": {"causal": {"mfu": 0.4}},
        "memory": {"peak_bytes": 2**30},
        "lfr": {"share_of_step": 0.01},
        "parts": parts,
    }
    part = {"state": "passed", "seconds": 1.0, "why": "", "figures": figures}
    text = gpu_table.render({"mode": "measure", "card": "NVIDIA H100", "parts": {"benchmark": part}})
    assert "50000 tokens/s, MFU 0.400 (causal), 1.0 GiB, 1.00 % for choosing blocks" in text
    assert "forward 100.0, step 300.0" in text


def test_the_table_holds_bars_against_figures() -> None:
    both = {
        name: {"ms": [ms, ms, ms], "peak_bytes": 0, "beyond_bytes": memory}
        for name, ms, memory in (
            ("ours, save", 11.0, 5), ("ours, chunk", 12.0, 1), ("ours, no statistics", 11.0, 5), ("floor", 10.0, 0),
            ("eager, fp32 logits", 20.0, 10), ("Liger, 4 x", 14.0, 2), ("Liger, 8 x", 10.0, 3),
        )
    }  # fmt: skip
    both["Cut Cross-Entropy"] = {"not_run": "ImportError: none"}  # type: ignore[dict-item]
    kernels = {"results": {"8192x4096x32000 / 1, torch.bfloat16, forward + backward": both}}
    errors = {"ours, save, torch.bfloat16": [1e-6, 1e-7, 1e-3, 4e-3], "eager, torch.bfloat16": [1e-3, 2e-3]}
    parts = {
        "kernels 32000": {"state": "passed", "seconds": 1.0, "why": "", "figures": kernels},
        "accuracy": {"state": "passed", "seconds": 1.0, "why": "", "figures": {"accuracy": errors}},
    }
    lines = gpu_table.render({"mode": "measure", "card": "NVIDIA H100", "parts": parts}).splitlines()

    def line(start: str) -> str:
        return next(line for line in lines if line.strip().startswith(start))

    assert "1.100 of 1.100 met" in line("save / 3 GEMMs")
    assert "1.200 of 1.150 MISSED" in line("chunk / 3 GEMMs")
    assert "1.100 of 0.950 MISSED" in line("save / Liger, best")
    assert "0.100 of 0.143 met" in line("memory beyond")
    assert line("save / Cut").count("not measured") == 2
    assert any("Cut Cross-Entropy: ImportError" in text for text in lines)
    assert "MISSED" in line("ours, save, torch.bfloat16")
    assert "MISSED" not in line("eager, torch.bfloat16")
    assert "Not an H200" in "".join(lines)


def test_a_benchmark_survives_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours included; and what was found before is on the disk at each row."""

    def breaks(x: Any, *_: Any) -> Any:
        known.append(json.loads((tmp_path / "k.json").read_text())["results"])
        raise KeyError("a compiler's own error")

    known: list[dict[str, Any]] = []
    monkeypatch.setattr(benchmark_kernels, "without_statistics", breaks)
    monkeypatch.setattr(benchmark_kernels, "eager_loss", breaks)
    monkeypatch.setattr(benchmark_kernels, "peak_bytes", lambda run, device: run() or 0)
    benchmark_kernels.main(["--shapes", "16x8x32,16x8x48", "--rounds", "1", "--json", str(tmp_path / "k.json")])
    results = json.loads((tmp_path / "k.json").read_text())["results"]
    assert len(results) == 4
    assert results["16x8x48 / 1, torch.float32, forward + backward"]["eager"]["not_run"].startswith("KeyError")
    assert "ours, save" in known[0]["16x8x32 / 1, torch.float32, forward + backward"]
    assert "not run: KeyError" in capsys.readouterr().out


def test_a_layers_parts_are_compared() -> None:
    """With what they were before, and with a peer that fails."""

    def breaks(*_: Any) -> Any:
        raise RuntimeError("a peer's own error")

    kernels = {"ours": LayerKernels(), "before": benchmark_layers.before(), "broken": LayerKernels(breaks)}
    cases = benchmark_layers.make_cases(MODEL_PRESETS["demo"], 64, "cpu")
    assert {case.method for case in cases.values()} == set(vars(LayerKernels()))
    for case in cases.values():
        results = benchmark_layers.measure(case, kernels, 1, "cpu")
        assert ("not_run" in results["broken"]) == (case.method == "rms_norm")
        assert results["ours"]["time / ours"] == 1.0 != results["before"]["time / ours"]
        old, new = (benchmark_layers.forward_backward(case, kernels[name])() for name in ("before", "ours"))
        for one, other in zip(old, new, strict=True):
            torch.testing.assert_close(one, other)
    gate = cases["SwiGLU"].inputs[0]
    assert cases["SwiGLU"].least_bytes() == 2 * gate.numel() * (2 + 1 + 1 + 2 + 2)


def test_nothing_of_ours_need_work(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark_kernels.report(
        "title", {"ours, save": {"not_run": "X"}, "floor": {"ms": [1.0], "peak_bytes": 0, "beyond_bytes": 0}}
    )
    assert "nan" in capsys.readouterr().out


class InProcess(gpu_runs.Lab):
    """Runs without a process of their own."""

    def run(self, name: str, flags: list[str], device: str = "", launcher: tuple[str, ...] = ()) -> None:
        config, _ = parse_run_config([*flags, "--save", str(self.folder / name)])
        with (self.folder / f"{name}.log").open("w") as log, contextlib.redirect_stdout(log):
            train(config)


def test_runs_are_compared(tmp_path: Path) -> None:
    lab = InProcess(tmp_path, on_gpu=False)
    assert gpu_runs.losses(lab)["fp32"]["fp32 / cpu"] == 0.0
    lab.run("other", [*lab.flags(4), "--seed", "5"])
    with pytest.raises(gpu_runs.CheckError, match=r"losses of 'other' and 'cpu' differ by"):
        gpu_runs.differ(lab, "other", "cpu", 1e-6)


def test_attention_is_compared_and_named(tmp_path: Path) -> None:
    lab = InProcess(tmp_path, on_gpu=False)
    results = gpu_runs.documents(lab)
    assert results.keys() == {"fp32", "bf16"}
    for name, itemsize in (("fp32", 4), ("bf16", 2)):
        assert f"a dense document mask of {itemsize * 4 * 16 * 16:,} bytes" in results[name]["attention"]
    with pytest.raises(gpu_runs.CheckError, match="run 'bf16': expected one line on attention by flex_attention"):
        gpu_runs.attention_line(lab, "bf16", "flex_attention")


def test_what_needs_a_gpu_is_tried_on_a_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts of waits and of memory, with the calls of CUDA taken out."""
    toy = benchmark_training.parse(gpu_parts.TOY_TRAINING.split())
    monkeypatch.setattr(benchmark_training, "parse", lambda arguments: toy)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    lab = gpu_runs.Lab(tmp_path, on_gpu=True)
    with session():
        assert gpu_runs.syncs(lab) == {"waits in two steps": 0, "places": {}}
