"""Step time: what recording costs, and ours against transformers' LlamaForCausalLM in the same loop.

"Not recorded" is the same step of the same engine, whose per-block losses are thrown away. "PyTorch's loss" is our
model with F.cross_entropy, which has none.

    python tools/benchmark_step.py [--pairs 40] [--json OUT.json]

Pairs of steps are interleaved, A B B A, on the same batches; the ratio of each pair is taken, and the median ratio with
a 95 % bootstrap interval is printed. CPU, fp32, the demo's configuration by default. Needs transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_lfr.data.loader import Batch
from megatron_lfr.engine import NativeEngine
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.kernels import BlockStats
from megatron_lfr.lfr import Curriculum, Journal, Phase, Schedule
from megatron_lfr.model import MODEL_PRESETS, Llama, ModelConfig


class WithoutRecording(nn.Module):
    """Our model with PyTorch's cross-entropy: no per-block losses come out of the step."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = model.vocab_size

    def loss(self, tokens: Tensor, labels: Tensor, token_weight: Tensor, **_: object) -> tuple[Tensor, BlockStats]:
        logits = F.linear(self.model(tokens), self.model.output_weight)
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return (nll * token_weight.flatten()).sum(), BlockStats(torch.zeros(0), torch.zeros(0))


class Transformers(nn.Module):
    """transformers' LlamaForCausalLM of the same shape, with its own loss."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.ffn_hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_query_groups or config.num_attention_heads,
                max_position_embeddings=config.max_position_embeddings,
                rms_norm_eps=config.norm_epsilon,
                tie_word_embeddings=not config.untie_embeddings_and_output_weights,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )

    def loss(self, tokens: Tensor, labels: Tensor, token_weight: Tensor, **_: object) -> tuple[Tensor, BlockStats]:
        output = self.model(input_ids=tokens, labels=labels, shift_labels=labels)
        return output.loss, BlockStats(torch.zeros(0), torch.zeros(0))


def make_engine(model: nn.Module, micro_batch_size: int) -> NativeEngine:
    return NativeEngine(model, OptimizerConfig(lr=1e-4), micro_batch_size, torch.device("cpu"))  # type: ignore[arg-type]


def make_batch(step: int, ids: np.ndarray, rows: int, seq: int, vocab: int, rng: np.random.Generator) -> Batch:
    tokens = torch.from_numpy(rng.integers(0, vocab, (rows, seq + 1)))
    mask = torch.ones(rows, seq)
    return Batch(step, ids, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, None, None, rows * seq)


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def interleave(
    one: Callable[[Batch], object], two: Callable[[Batch], object], batches: list[Batch]
) -> dict[str, object]:
    """Seconds of both on each batch, alternating which goes first, and the ratio one / two."""
    times = np.empty((len(batches), 2))
    for number, batch in enumerate(batches):
        pair = [(0, one), (1, two)]
        for column, step in pair if number % 2 == 0 else reversed(pair):
            times[number, column] = timed(lambda step=step, batch=batch: step(batch))  # type: ignore[misc]
    ratios = times[:, 0] / times[:, 1]
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {
        "pairs": len(batches),
        "median_ms": [1000 * float(t) for t in np.median(times, axis=0)],
        "ratio": float(np.median(ratios)),
        "interval_95": [float(low), float(high)],
    }


def measure(args: argparse.Namespace, config: ModelConfig) -> dict[str, object]:
    """All comparisons, on random tokens."""
    rng = np.random.default_rng(0)
    ours = make_engine(Llama(config, seed=1), args.batch)
    plain = make_engine(WithoutRecording(Llama(config, seed=1)), args.batch)
    theirs = make_engine(Transformers(config, args.vocab_size), args.batch)
    n_steps = 3 * args.pairs + 20
    plan = Schedule((Phase("learn", n_steps, "steps"),)).plan(n_steps * args.batch, args.seq_length, args.batch)
    recording: list[float] = []
    steps: list[float] = []

    def batches(count: int) -> list[Batch]:
        ids = np.arange(args.batch)
        return [make_batch(0, ids, args.batch, args.seq_length, args.vocab_size, rng) for _ in range(count)]

    with tempfile.TemporaryDirectory() as folder:
        curriculum = Curriculum(plan, Journal(Path(folder), {}), seed=1)
        curriculum.enter_phase()

        def recorded(batch: Batch) -> None:
            started = time.perf_counter()
            output = ours.train_step(batch, 1e-4)
            trained = time.perf_counter()
            curriculum.record(curriculum.next_step, output.blocks.nll_sum, output.blocks.token_count)
            recording.append(time.perf_counter() - trained)
            steps.append(time.perf_counter() - started)

        others = {"recording on / not recorded": ours, "recording on / PyTorch's loss": plain}
        others["ours with recording / transformers"] = theirs
        results: dict[str, object] = {}
        for name, engine in others.items():

            def other(batch: Batch, engine: NativeEngine = engine) -> None:
                engine.train_step(batch, 1e-4)

            for batch in batches(5):  # warm up
                recorded(batch)
                other(batch)
            results[name] = interleave(recorded, other, batches(args.pairs))
    results["recording alone, share of a step"] = statistics.median(recording) / statistics.median(steps)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--model-preset", default="demo")
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = dataclasses.replace(MODEL_PRESETS[args.model_preset], vocab_size=args.vocab_size)
    results = measure(args, config)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{config.num_parameters():,} parameters, batch {args.batch} x {args.seq_length}, vocabulary {args.vocab_size}"
    )
    for name, result in results.items():
        if isinstance(result, dict):
            first, second = result["median_ms"]
            low, high = result["interval_95"]
            print(f"{name:34s} {first:8.2f} / {second:8.2f} ms  ratio {result['ratio']:.4f} [{low:.4f}, {high:.4f}]")
        else:
            print(f"{name:34s} {result:.5f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
