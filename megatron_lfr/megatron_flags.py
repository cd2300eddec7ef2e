"""Megatron-LM's flags that are no settings here: accepted because their value is what is done, or refused.

The argument list of a Megatron script is read in two steps: `strip_megatron_flags` takes out the flags of the
two tables below; what is left are settings of the run's configuration, which have Megatron's names too. Names
and numbers of values follow Megatron-LM's megatron/training/arguments.py and the dataclasses behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Arity = Literal[0, 1, "+"]
"""How many values a flag takes: none, one, or all words up to the next flag."""


@dataclass(frozen=True)
class AcceptedFlag:
    """A flag that asks for what is done anyway, or that cannot change a result."""

    arity: Arity
    legal: tuple[str, ...] | None
    """The values that are accepted; None: any. Numbers compare by value, so that 1 is 1.0."""
    reason: str


@dataclass(frozen=True)
class RefusedFlag:
    """A flag that asks for something this package does not do."""

    arity: Arity
    reason: str
    instead: str
    """What to give in its place."""


_ANY = ""
_IMPLEMENTATION = "no effect: speed only, the layers have one implementation"
_ATTENTION = "attention is PyTorch's scaled_dot_product_attention, which chooses its kernel"
_SEED = "initial weights depend on the seed alone"
_LAYER_BY_LAYER = "full recomputation is layer by layer"
_FP32_STATE = "weights, gradients and optimizer state are fp32"
_NEEDS_FP16 = "no effect: read only with --fp16, which is refused"
_NEEDS_FSDP = "no effect: read only with --use-megatron-fsdp, which is refused"
_NEEDS_PROFILE = "no effect: read only with --profile, which is refused"
_ONE_RANK = "no effect: one rank, the only number so far, has nothing to share or to overlap"
_DCP = "checkpoints are torch.distributed.checkpoint's"
_GARBAGE = "no effect: speed only, garbage collection is left to Python"

# (flags, number of values, legal values, reason); words apart by spaces
_ACCEPTED_ROWS: tuple[tuple[str, Arity, str, str], ...] = (
    # Model
    ("--use-mcore-models", 0, _ANY, "there is one implementation of the model"),
    ("--transformer-impl", 1, "local transformer_engine", "no effect: the layers are our own"),
    ("--swiglu", 0, _ANY, "the feed-forward is SwiGLU"),
    ("--normalization", 1, "RMSNorm", "norms are RMSNorm"),
    # Norm weights are fp32 and not decayed: 1 + w from w = 0 takes the same path as w from 1.
    (
        "--apply-layernorm-1p",
        0,
        _ANY,
        "no effect: norm weights are fp32 and not decayed, so they train alike",
    ),
    ("--position-embedding-type --rope-type", 1, "rope", "positions are rotary"),
    ("--use-rotary-position-embeddings --no-position-embedding", 0, _ANY, "positions are rotary"),
    ("--rotary-percent", 1, "1.0", "the whole head is rotated"),
    ("--disable-bias-linear", 0, _ANY, "linear layers have no bias"),
    ("--hidden-dropout --attention-dropout", 1, "0.0", "there is no dropout"),
    ("--group-query-attention", 0, _ANY, "query groups come from --num-query-groups"),
    ("--attention-backend", 1, "auto flash fused", _ATTENTION),
    ("--use-flash-attn", 0, _ANY, _ATTENTION),
    ("--attention-softmax-in-fp32", 0, _ANY, "the softmax of attention is summed in fp32"),
    ("--softmax-type", 1, "vanilla", "the softmax of attention has no offset"),
    ("--use-cpu-initialization --init-model-with-meta-device", 0, _ANY, _SEED),
    ("--te-rng-tracker", 0, _ANY, "no random number is drawn after initialisation"),
    ("--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion", 0, _ANY, _IMPLEMENTATION),
    ("--no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm", 0, _ANY, _IMPLEMENTATION),
    ("--no-gradient-accumulation-fusion", 0, _ANY, _IMPLEMENTATION),
    ("--cross-entropy-loss-fusion", 0, _ANY, "no effect: speed only, the loss is our own"),
    ("--cross-entropy-fusion-impl", 1, "native te", "no effect: speed only, the loss is our own"),
    ("--recompute-method", 1, "uniform", _LAYER_BY_LAYER),
    ("--recompute-num-layers", 1, "1", _LAYER_BY_LAYER),
    ("--recompute-modules", "+", "core_attn", "selective recomputation is of attention"),
    ("--cuda-graph-impl", 1, "none", "CUDA graphs are not used"),
    # Optimizer and precision
    (
        "--calculate-per-token-loss",
        0,
        _ANY,
        "the loss is always the mean over the global batch's valid tokens",
    ),
    ("--optimizer", 1, "adam", "the optimizer is AdamW, as Megatron's adam is"),
    ("--weight-decay-incr-style", 1, "constant", "weight decay is constant"),
    ("--lr-warmup-init", 1, "0.0", "warm-up starts from 0"),
    ("--override-opt-param-scheduler", 0, _ANY, "the schedule always follows the flags"),
    ("--accumulate-allreduce-grads-in-fp32", 0, _ANY, "gradients are summed in fp32"),
    ("--main-params-dtype --main-grads-dtype --exp-avg-dtype --exp-avg-sq-dtype", 1, "fp32", _FP32_STATE),
    ("--initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis", 1, _ANY, _NEEDS_FP16),
    (
        "--no-check-for-nan-in-loss-and-grad",
        0,
        _ANY,
        "the check stays on: a step that is not finite is skipped and counted",
    ),
    ("--rerun-mode", 1, "disabled", "no step is computed twice"),
    # Ranks
    ("--sequence-parallel", 0, _ANY, "no effect: with one tensor-parallel rank Megatron turns it off too"),
    ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 0, _ANY, _ONE_RANK),
    ("--overlap-param-gather-with-optimizer-step --no-align-param-gather", 0, _ANY, _ONE_RANK),
    ("--no-overlap-p2p-communication --tp-comm-overlap --use-tp-pp-dp-mapping", 0, _ANY, _ONE_RANK),
    ("--ddp-average-in-collective --ddp-pad-buckets-for-high-nccl-busbw --use-nccl-ub", 0, _ANY, _ONE_RANK),
    ("--distribute-saved-activations", 0, _ANY, _ONE_RANK),
    ("--ddp-bucket-size --ddp-num-buckets", 1, _ANY, _ONE_RANK),
    ("--cp-comm-type", "+", _ANY, _ONE_RANK),
    ("--expert-model-parallel-size --expert-tensor-parallel-size", 1, "1", "there are no experts"),
    ("--fsdp-double-buffer --fsdp-manual-registration", 0, _ANY, _NEEDS_FSDP),
    ("--data-parallel-sharding-strategy", 1, _ANY, _NEEDS_FSDP),
    # Data
    ("--dataloader-type", 1, "single", "the curriculum gives the order of the blocks"),
    ("--data-cache-path", 1, _ANY, "no effect: no index is stored, so there is nothing to cache"),
    ("--num-dataset-builder-threads", 1, _ANY, "no effect: no index is built"),
    ("--no-mmap-bin-files", 0, _ANY, "the .bin files are read, not mapped"),
    ("--no-create-attention-mask-in-dataloader", 0, _ANY, "the loader makes no mask"),
    ("--num-workers", 1, _ANY, "no effect: speed only, one thread reads ahead (--prefetch)"),
    ("--allow-ambiguous-pad-tokens", 0, _ANY, "no token of the corpus is taken for padding"),
    ("--tokenizer-type", 1, "HuggingFaceTokenizer", "--tokenizer-model is a file of `tokenizers`"),
    ("--tiktoken-pattern", 1, _ANY, "no effect: read only by TikTokenizer, which is refused"),
    ("--vocab-extra-ids", 1, "0", "no token is added to the vocabulary"),
    # Checkpoints
    ("--ckpt-format", 1, "torch_dist torch_dcp", _DCP),
    ("--use-dist-ckpt --auto-detect-ckpt-format", 0, _ANY, _DCP),
    ("--verify-integrity", 0, _ANY, "every file of a checkpoint is checked against its hash"),
    ("--dist-ckpt-strictness", 1, "raise_all", "a checkpoint must match the model"),
    ("--ckpt-fully-parallel-save --no-ckpt-fully-parallel-save", 0, _ANY, _ONE_RANK),
    ("--ckpt-fully-parallel-load --ckpt-assume-constant-structure", 0, _ANY, _ONE_RANK),
    # The loop and its output
    ("--manual-gc --no-manual-gc-eval", 0, _ANY, _GARBAGE),
    ("--manual-gc-interval", 1, _ANY, _GARBAGE),
    ("--empty-unused-memory-level", 1, "0 1 2", "no effect: memory is left to PyTorch's allocator"),
    ("--exit-signal-handler", 0, _ANY, "SIGTERM and SIGUSR1 always save and exit"),
    ("--train-sync-interval", 1, _ANY, "no effect: speed only, each step waits for its loss"),
    ("--log-throughput", 0, _ANY, "throughput is always logged"),
    ("--logging-level", 1, "20", "messages from INFO on are shown"),
    ("--timing-log-level", 1, "0", "times are logged for whole steps"),
    (
        "--timing-log-option",
        1,
        _ANY,
        "no effect: read only with a --timing-log-level above 0, which is refused",
    ),
    ("--no-barrier-with-level-1-timing", 0, _ANY, "there are no barriers around timers"),
    ("--no-log-loss-scale-to-tensorboard", 0, _ANY, "there is no loss scale"),
    ("--tensorboard-queue-size", 1, _ANY, "no effect: TensorBoard keeps its own queue"),
    ("--no-one-logger", 0, _ANY, "NVIDIA's one logger is not used"),
    ("--profile-step-start --profile-step-end", 1, _ANY, _NEEDS_PROFILE),
    ("--profile-ranks", "+", _ANY, _NEEDS_PROFILE),
)

_LEAVE_OUT = "leave it out"
_LLAMA = "the model is a Llama"
_NO_EXPERTS = "mixtures of experts are not supported"
_NO_FP16 = "fp16 needs loss scaling, which is not supported"
_NO_FP8 = "8-bit training is not supported"
_NO_PIPELINE = "pipelines are not supported so far"
_NO_SHARDING = "sharding is not supported so far"
_NO_GRAPHS = "CUDA graphs are not supported"
_NO_METRIC = "it is not among the metrics of metrics.jsonl and TensorBoard"
_OLD = "an old name in Megatron too"
_ONE_RATE = "all weights have one learning rate"
_ONE_BATCH_SIZE = "the batch size is constant"
_ONE_CORPUS = "one list of prefixes, given on the command line or in --config, is divided by --split"
_WHOLE_STATE = "a checkpoint is the whole state of a run"
_BATCH_FLAGS = "--micro-batch-size and --global-batch-size, which serve evaluation too"
_WANDB = "W&B reads it from the environment"

# (flags, number of values, reason, what to give instead); flags apart by spaces
_REFUSED_ROWS: tuple[tuple[str, Arity, str, str], ...] = (
    # Model
    ("--squared-relu --quick-geglu --openai-gelu", 0, _LLAMA, "--swiglu"),
    ("--add-qkv-bias", 0, _LLAMA, "--disable-bias-linear"),
    ("--qk-layernorm --multi-latent-attention", 0, _LLAMA, _LEAVE_OUT),
    ("--window-size --mtp-num-layers", 1, _LLAMA, _LEAVE_OUT),
    ("--num-experts --moe-router-topk --moe-token-dispatcher-type", 1, _NO_EXPERTS, _LEAVE_OUT),
    ("--moe-aux-loss-coeff --moe-router-load-balancing-type", "+", _NO_EXPERTS, _LEAVE_OUT),
    ("--moe-grouped-gemm", 0, _NO_EXPERTS, _LEAVE_OUT),
    (
        "--rotary-seq-len-interpolation-factor",
        1,
        "rotary positions scale as Llama 3's do",
        "--use-rope-scaling",
    ),
    ("--apply-query-key-layer-scaling", 0, "scores are divided by the root of the head size", _LEAVE_OUT),
    ("--init-method-xavier-uniform", 0, "weights are drawn from a normal distribution", "--init-method-std"),
    ("--embedding-init-method-std", 1, "embeddings start as the other weights do", "--init-method-std"),
    ("--padded-vocab-size", 1, "padding follows a rule", "--make-vocab-size-divisible-by"),
    ("--recompute-activations", 0, "another flag says it", "--recompute-granularity selective"),
    ("--checkpoint-activations", 0, _OLD, "--recompute-granularity full"),
    ("--encoder-num-layers", 1, _OLD, "--num-layers"),
    ("--encoder-seq-length", 1, _OLD, "--seq-length"),
    ("--enable-cuda-graph --external-cuda-graph", 0, _NO_GRAPHS, _LEAVE_OUT),
    ("--deterministic-mode", 0, "runs repeat bit for bit on a CPU; a GPU promises nothing", _LEAVE_OUT),
    # Precision
    ("--fp16 --fp16-lm-cross-entropy", 0, _NO_FP16, "--bf16"),
    ("--loss-scale", 1, "there is no loss scale", "--bf16 alone"),
    ("--fp8-format --fp8-recipe --fp8-margin --fp8-interval", 1, _NO_FP8, "--bf16 alone"),
    ("--fp8-amax-history-len --fp8-amax-compute-algo", 1, _NO_FP8, "--bf16 alone"),
    ("--fp8-param-gather --no-fp8-wgrad --first-last-layers-bf16", 0, _NO_FP8, "--bf16 alone"),
    ("--fp4-format", 1, "4-bit training is not supported", "--bf16 alone"),
    ("--grad-reduce-in-bf16", 0, "gradients are summed in fp32", "--accumulate-allreduce-grads-in-fp32"),
    ("--use-precision-aware-optimizer", 0, _FP32_STATE, _LEAVE_OUT),
    ("--fp32-residual-connection", 0, "with --bf16 the residual stream is bf16", _LEAVE_OUT),
    # Optimizer and schedule
    ("--decoupled-lr", 1, _ONE_RATE, "--lr"),
    ("--decoupled-min-lr", 1, _ONE_RATE, "--min-lr"),
    ("--start-weight-decay --end-weight-decay", 1, "weight decay is constant", "--weight-decay"),
    ("--no-weight-decay-cond-type", 1, "norms alone have no weight decay", _LEAVE_OUT),
    ("--use-checkpoint-opt-param-scheduler", 0, "the schedule always follows the flags", _LEAVE_OUT),
    ("--warmup", 1, _OLD, "--lr-warmup-iters"),
    ("--batch-size", 1, _OLD, "--micro-batch-size"),
    ("--rampup-batch-size", "+", _ONE_BATCH_SIZE, "--global-batch-size"),
    ("--step-batch-size-schedule", 1, _ONE_BATCH_SIZE, "--global-batch-size"),
    ("--decrease-batch-size-if-needed", 0, _ONE_BATCH_SIZE, "--global-batch-size"),
    ("--iterations-to-skip", "+", "every step is trained", _LEAVE_OUT),
    ("--optimizer-cpu-offload", 0, "optimizer state stays on the device", _LEAVE_OUT),
    # Ranks
    ("--use-megatron-fsdp --use-torch-fsdp2", 0, _NO_SHARDING, "one rank that holds the whole model"),
    ("--num-layers-per-virtual-pipeline-stage", 1, _NO_PIPELINE, "--pipeline-model-parallel-size 1"),
    ("--num-virtual-stages-per-pipeline-rank", 1, _NO_PIPELINE, "--pipeline-model-parallel-size 1"),
    ("--pipeline-model-parallel-layout", 1, _NO_PIPELINE, "--pipeline-model-parallel-size 1"),
    ("--model-parallel-size", 1, _OLD, "--tensor-model-parallel-size"),
    ("--data-parallel-random-init", 0, "all ranks start from the same weights", _LEAVE_OUT),
    # Data and evaluation
    ("--mock-data", 0, "training needs a corpus", "`make demo`, or --data-path with a preprocessed corpus"),
    ("--train-data-path --valid-data-path --test-data-path", "+", _ONE_CORPUS, "--data-path and --split"),
    ("--data-args-path --per-split-data-args-path", 1, _ONE_CORPUS, "--data-path and --split"),
    ("--vocab-file --merge-file", 1, "tokenizers are files of `tokenizers`", "--tokenizer-model"),
    ("--null-tokenizer-eod-id", 1, "the tokenizer names its end-of-document token", "--eod-token"),
    ("--dataloader-inter-document-masking", 0, "another flag says it", "--reset-attention-mask"),
    ("--sft --fim-data", 0, "training is on plain text", _LEAVE_OUT),
    ("--eval-micro-batch-size --eval-global-batch-size", 1, _ONE_BATCH_SIZE, _BATCH_FLAGS),
    ("--full-validation", 0, "evaluation covers the whole split by default", "no --eval-iters"),
    ("--skip-train", 0, "the command trains", _LEAVE_OUT),
    # Checkpoints
    ("--async-save", 0, "the next step waits for a checkpoint", _LEAVE_OUT),
    ("--use-checkpoint-args", 0, "the model is given by flags", "--model-preset, or the model's own flags"),
    ("--no-load-optim --no-load-rng", 0, _WHOLE_STATE, "--finetune, for a new run from the weights alone"),
    ("--no-save-optim --no-save-rng", 0, _WHOLE_STATE, _LEAVE_OUT),
    ("--ckpt-step", 1, "a run is continued from its newest whole checkpoint", _LEAVE_OUT),
    ("--pretrained-checkpoint", 1, "other flags say it", "--load with --finetune"),
    ("--exit-on-missing-checkpoint", 0, "a run without a checkpoint starts at step 0", _LEAVE_OUT),
    ("--save-retain-interval", 1, "checkpoints are kept by number", "--keep-last"),
    ("--non-persistent-save-interval", 1, "there is one kind of checkpoint", "--save-interval"),
    # Output
    (
        "--profile --use-pytorch-profiler",
        0,
        "profiling is not built in",
        "`nsys profile` without a capture range",
    ),
    ("--record-memory-history", 0, "profiling is not built in", _LEAVE_OUT),
    ("--tensorboard-log-interval", 1, "TensorBoard gets what the console gets", "--log-interval"),
    ("--log-params-norm --log-num-zeros-in-grad --log-progress --log-energy", 0, _NO_METRIC, _LEAVE_OUT),
    ("--log-memory-to-tensorboard --log-timers-to-tensorboard", 0, _NO_METRIC, _LEAVE_OUT),
    ("--log-validation-ppl-to-tensorboard --log-world-size-to-tensorboard", 0, _NO_METRIC, _LEAVE_OUT),
    ("--wandb-entity", 1, _WANDB, "WANDB_ENTITY"),
    ("--wandb-save-dir", 1, _WANDB, "WANDB_DIR"),
)


def _accepted(rows: Iterable[tuple[str, Arity, str, str]]) -> dict[str, AcceptedFlag]:
    return {
        flag: AcceptedFlag(arity, tuple(legal.split()) or None, reason)
        for flags, arity, legal, reason in rows
        for flag in flags.split()
    }


def _refused(rows: Iterable[tuple[str, Arity, str, str]]) -> dict[str, RefusedFlag]:
    return {
        flag: RefusedFlag(arity, reason, instead) for flags, arity, reason, instead in rows for flag in flags.split()
    }


ACCEPTED: dict[str, AcceptedFlag] = _accepted(_ACCEPTED_ROWS)
"""Flags that are taken out of an argument list with a note."""

REFUSED: dict[str, RefusedFlag] = _refused(_REFUSED_ROWS)
"""Flags that end the program, with the reason and what to give instead."""


def strip_megatron_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(`argv` without the flags of the two tables, a note on each of them).

    Reads `--flag value`, `--flag=value`, `--flag a b` (lists), and underscores for hyphens in names of flags.
    All other words are handed on untouched and in order. Raises one ValueError that names every refused flag
    and every value that is not accepted, a line for each, with the reason and the legal values.
    """
    rest: list[str] = []
    notes: list[str] = []
    problems: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        name, equals, value = word.partition("=")
        flag = name.replace("_", "-")
        spec = ACCEPTED.get(flag) or REFUSED.get(flag)
        if spec is None:
            rest.append(word)
            continue
        values = [value] if equals else _take_values(words, spec.arity)
        problem = _problem(flag, spec, values)
        if problem is not None:
            problems.append(problem)
        else:
            notes.append(f"{' '.join([flag, *values])}: accepted, {spec.reason}")
    if problems:
        raise ValueError("\n".join(problems))
    return rest, notes


def _take_values(words: deque[str], arity: Arity) -> list[str]:
    """Take from the head of `words` the values that `arity` allows; a word that begins with `--` is none."""
    limit = len(words) if arity == "+" else arity
    values: list[str] = []
    while words and len(values) < limit and not words[0].startswith("--"):
        values.append(words.popleft())
    return values


def _problem(flag: str, spec: AcceptedFlag | RefusedFlag, values: list[str]) -> str | None:
    """Why a flag with these values ends the program; None: it does not."""
    if isinstance(spec, RefusedFlag):
        return f"{flag}: refused: {spec.reason}; instead: {spec.instead}"
    if spec.arity == 0:
        return f"{flag}: takes no value, got {' '.join(values)!r}" if values else None
    legal = "any" if spec.legal is None else ", ".join(spec.legal)
    if not values:
        return f"{flag}: needs a value; legal: {legal}"
    for value in values:
        if spec.legal is not None and not any(_equal(value, choice) for choice in spec.legal):
            return f"{flag} {value}: refused: {spec.reason}; legal: {legal}"
    return None


def _equal(value: str, choice: str) -> bool:
    """Whether two values are the same word or the same number."""
    try:
        return float(value) == float(choice)
    except ValueError:
        return value == choice
