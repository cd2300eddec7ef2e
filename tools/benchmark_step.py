"""Measures step times: what recording costs, and ours against transformers' LlamaForCausalLM in the same loop.

"Not recorded" is the same step of the same engine, whose per-block losses are thrown away. "PyTorch's loss" is our
model with F.cross_entropy, which has none, in a plain loop without FSDP2.

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

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine import NativeEngine, build_stages, shard_stages
from megatron_lfr.engine.optimizer import OptimizerConfig, build_optimizer
from megatron_lfr.lfr import Curriculum, Journal, Phase, Schedule
from megatron_lfr.model import MODEL_PRESETS, Decoder, ModelConfig
from megatron_lfr.parallel import ParallelConfig, initialize


class PlainLoop:
    """A step as one writes it in plain PyTorch, on one process: forward, backward, clipping, AdamW."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = list(model.parameters())
        decayed = [parameter.ndim >= 2 for parameter in self.parameters]
        self.optimizer = build_optimizer(OptimizerConfig(lr=1e-4), self.parameters, decayed)

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def train_step(self, batch: Batch, lr: float) -> float:
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class WithoutRecording(PlainLoop):
    """Our model with PyTorch's cross-entropy: no per-block losses come out of the step."""

    model: Decoder

    def loss(self, batch: Batch) -> Tensor:
        logits = self.model.logits(self.model.hidden_states(batch.tokens).flatten(0, 1))
        return F.cross_entropy(logits, batch.labels.flatten())


class Transformers(PlainLoop):
    """transformers' LlamaForCausalLM of the same shape, with its own loss."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__(
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=vocab_size,
                    hidden_size=config.hidden_size,
                    intermediate_size=config.ffn_size,
                    num_hidden_layers=config.num_layers,
                    num_attention_heads=config.num_attention_heads,
                    num_key_value_heads=config.query_groups,
                    max_position_embeddings=config.max_position_embeddings,
                    rms_norm_eps=config.norm_epsilon,
                    tie_word_embeddings=not config.untie_embeddings_and_output_weights,
                    use_cache=False,
                    attn_implementation="sdpa",
                )
            )
        )

    def loss(self, batch: Batch) -> Tensor:
        return self.model(input_ids=batch.tokens, labels=batch.labels, shift_labels=batch.labels).loss


def make_engine(config: ModelConfig, seq_length: int, rows: int, layout: ParallelConfig | None = None) -> NativeEngine:
    """Make our engine, with micro-batches of all of a data-parallel rank's rows."""
    parallel = initialize(layout)
    return NativeEngine(
        shard_stages(build_stages(config, parallel), parallel, 1),
        OptimizerConfig(lr=1e-4),
        parallel,
        seq_length=seq_length,
        micro_batch_size=rows,
        global_batch_size=rows,
    )


def make_batch(step: int, ids: np.ndarray, rows: int, seq: int, vocab: int, rng: np.random.Generator) -> Batch:
    tokens = torch.from_numpy(rng.integers(0, vocab, (rows, seq + 1)))
    mask = torch.ones(rows, seq)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Batch(step, ids, slice(0, rows), inputs, labels, mask, None, None, rows * seq)


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def interleave(
    one: Callable[[Batch], object], two: Callable[[Batch], object], batches: list[Batch]
) -> dict[str, object]:
    """Return the seconds of both on each batch, alternating which goes first, and the ratio one / two."""
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
    """Make all comparisons, on random tokens."""
    rng = np.random.default_rng(0)
    ours = make_engine(config, args.seq_length, args.batch)
    plain = WithoutRecording(Decoder(config, seed=1))
    theirs = Transformers(config, args.vocab_size)
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
            blocks = output.wait()
            curriculum.record(curriculum.next_step, *blocks)
            recording.append(time.perf_counter() - trained)
            steps.append(time.perf_counter() - started)

        others: dict[str, NativeEngine | PlainLoop] = {
            "recording on / not recorded": ours,
            "recording on / PyTorch's loss": plain,
        }
        others["ours with recording / transformers"] = theirs
        results: dict[str, object] = {}
        for name, engine in others.items():

            def other(batch: Batch, engine: NativeEngine | PlainLoop = engine) -> None:
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
