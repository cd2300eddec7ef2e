"""Megatron-LM's flags that are not settings here: accepted because they ask for what is done anyway, or refused.

The argument list of a Megatron script is read in two steps: `strip_megatron_flags` takes out the flags of the two
tables below; what is left are settings of the run's configuration, which have Megatron's names, too. Names and numbers
of values follow Megatron-LM's megatron/training/arguments.py and the dataclasses behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Arity = Literal[0, 1, "+"]
"""Number of values that a flag takes: none, one, or all words up to the next flag."""


@dataclass(frozen=True)
class AcceptedFlag:
    """A flag that asks for what is done anyway, or that cannot change a result."""

    arity: Arity
    legal: tuple[str, ...] | None
    """The values that are accepted; None accepts any. Numbers compare by value, so that 1 is 1.0."""
    reason: str


@dataclass(frozen=True)
class RefusedFlag:
    """A flag that asks for something this package does not do."""

    arity: Arity
    reason: str
    instead: str
    """What to give instead."""


_ANY = ""
_IMPLEMENTATION = "no effect: speed only, the layers have one implementation"
_ATTENTION = "PyTorch chooses attention's kernel"
_SEED = "initial weights depend on the seed alone"
_LAYER_BY_LAYER = "full recomputation is layer by layer"
_FP32_STATE = "weights, gradients and optimizer state are fp32"
_NEEDS_FP16 = "no effect: read only with --fp16, which is refused"
_NEEDS_PROFILE = "no effect: read only with --profile, which is refused"
_OVERLAP = "communication overlaps with computation wherever the backend can"
_COMMUNICATION = "no effect: speed and memory only, communication is PyTorch's"
_NCCL = "no effect: speed only, NCCL is set up by its own environment variables"
_BACKWARD = "no effect: speed only, the order within a backward pass is PyTorch's"
_FSDP = "sharding is what --data-parallel-sharding-strategy says, by PyTorch's FSDP2"
_FP32_SUMS = "gradients are sent and summed in fp32"
_NEEDS_SHARP = "no effect: read only with --use-sharp, which has none"
_NEEDS_HYBRID = "no effect: read only with --hybrid-context-parallel, which is refused"
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
    ("--accumulate-allreduce-grads-in-fp32", 0, _ANY, _FP32_SUMS),
    ("--ddp-reduce-scatter-with-fp32-accumulation", 0, _ANY, _FP32_SUMS),
    ("--ddp-param-name-patterns-for-fp32-local-accumulation", "+", _ANY, _FP32_SUMS),
    ("--main-params-dtype --main-grads-dtype --exp-avg-dtype --exp-avg-sq-dtype", 1, "fp32", _FP32_STATE),
    ("--megatron-fsdp-main-params-dtype --megatron-fsdp-main-grads-dtype", 1, "fp32 auto", _FP32_STATE),
    ("--megatron-fsdp-grad-comm-dtype", 1, "fp32 auto", _FP32_SUMS),
    ("--initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis", 1, _ANY, _NEEDS_FP16),
    (
        "--no-check-for-nan-in-loss-and-grad",
        0,
        _ANY,
        "the check stays on: a step that is not finite is skipped and counted",
    ),
    ("--rerun-mode", 1, "disabled", "no step is computed twice"),
    # Ranks
    ("--overlap-grad-reduce --overlap-param-gather", 0, _ANY, _OVERLAP),
    ("--overlap-param-gather-with-optimizer-step --overlap-p2p-communication-warmup-flush", 0, _ANY, _COMMUNICATION),
    ("--no-overlap-p2p-communication --use-ring-exchange-p2p", 0, _ANY, _COMMUNICATION),
    ("--no-align-param-gather --no-align-grad-reduce --disable-align-grad-reduce", 0, _ANY, _COMMUNICATION),
    ("--microbatch-group-size-per-virtual-pipeline-stage", 1, _ANY, "no effect: speed and memory only"),
    ("--ddp-bucket-size --ddp-num-buckets --suggested-communication-unit-size", 1, _ANY, _COMMUNICATION),
    ("--ddp-pad-buckets-for-high-nccl-busbw --create-all-gather-group", 0, _ANY, _COMMUNICATION),
    (
        "--ddp-average-in-collective --no-gradient-reduce-div-fusion",
        0,
        _ANY,
        "no effect: the loss is normalised before gradients are summed",
    ),
    ("--defer-embedding-wgrad-compute --delay-wgrad-compute", 0, _ANY, _BACKWARD),
    ("--wgrad-deferral-limit", 1, _ANY, _BACKWARD),
    ("--use-megatron-fsdp", 0, _ANY, _FSDP),
    ("--megatron-fsdp-version", 1, "1 2", _FSDP),
    ("--outer-dp-sharding-strategy", 1, "no_shard", "--num-distributed-optimizer-instances are whole copies"),
    ("--fsdp-double-buffer --fsdp-manual-registration", 0, _ANY, _COMMUNICATION),
    ("--fsdp-db-use-persist-buf-on-alloc-fail --megatron-fsdp-max-pool-double-buffer", 0, _ANY, _COMMUNICATION),
    ("--megatron-fsdp-enable-fine-grained-param-gather", 0, _ANY, _COMMUNICATION),
    ("--use-nccl-ub --disable-symmetric-registration", 0, _ANY, _NCCL),
    ("--nccl-communicator-config-path", 1, _ANY, _NCCL),
    ("--high-priority-stream-groups", "+", _ANY, _NCCL),
    ("--use-sharp", 0, _ANY, _NCCL),
    ("--sharp-enabled-group", 1, _ANY, _NEEDS_SHARP),
    ("--tp-comm-overlap --tp-comm-overlap-rs-dgrad", 0, _ANY, _COMMUNICATION),
    ("--no-tp-comm-bulk-wgrad --no-tp-comm-bulk-dgrad", 0, _ANY, _COMMUNICATION),
    ("--disable-tp-comm-bulk-wgrad --disable-tp-comm-bulk-dgrad", 0, _ANY, _COMMUNICATION),
    ("--no-tp-comm-overlap-ag --no-tp-comm-overlap-rs", 0, _ANY, _COMMUNICATION),
    ("--disable-tp-comm-overlap-ag --disable-tp-comm-overlap-rs", 0, _ANY, _COMMUNICATION),
    ("--no-tp-comm-split-ag --no-tp-comm-split-rs", 0, _ANY, _COMMUNICATION),
    ("--disable-tp-comm-split-ag --disable-tp-comm-split-rs", 0, _ANY, _COMMUNICATION),
    ("--tp-comm-overlap-cfg --tp-comm-bootstrap-backend", 1, _ANY, _COMMUNICATION),
    ("--cp-comm-type", "+", "all_gather", "keys and values of all context-parallel ranks are gathered"),
    ("--max-seqlen-per-dp-cp-rank", 1, _ANY, _NEEDS_HYBRID),
    ("--local-rank", 1, _ANY, "no effect: the launcher's LOCAL_RANK says it"),
    ("--expert-model-parallel-size --expert-tensor-parallel-size", 1, "1", "there are no experts"),
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
    ("--ckpt-format", 1, "torch_dist torch_dcp fsdp_dtensor", _DCP),
    ("--use-dist-ckpt --auto-detect-ckpt-format", 0, _ANY, _DCP),
    ("--verify-integrity", 0, _ANY, "every file of a checkpoint is checked against its hash"),
    ("--dist-ckpt-strictness", 1, "raise_all", "a checkpoint must match the model"),
    ("--ckpt-fully-parallel-save", 0, _ANY, "each rank writes what it holds"),
    ("--ckpt-fully-parallel-load", 0, _ANY, "each rank reads what it holds"),
    ("--ckpt-assume-constant-structure", 0, _ANY, "no effect: speed only, each save is planned anew"),
    ("--dist-ckpt-optim-fully-reshardable", 0, _ANY, "a checkpoint fits any number and layout of ranks"),
    ("--distrib-optim-fully-reshardable-mem-efficient", 0, _ANY, "no effect: no rank collects others' state"),
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
_EVEN_STAGES = "pipeline stages share the layers evenly, with the embedding in the first and the loss in the last"
_VIRTUAL_STAGES = "--num-layers-per-virtual-pipeline-stage"
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
    ("--deterministic-mode", 0, "another flag says it", "--deterministic"),
    # Precision
    ("--fp16 --fp16-lm-cross-entropy", 0, _NO_FP16, "--bf16"),
    ("--loss-scale", 1, "there is no loss scale", "--bf16 alone"),
    ("--fp8-format --fp8-recipe --fp8-margin --fp8-interval", 1, _NO_FP8, "--bf16 alone"),
    ("--fp8-amax-history-len --fp8-amax-compute-algo", 1, _NO_FP8, "--bf16 alone"),
    ("--fp8-param-gather --no-fp8-wgrad --first-last-layers-bf16", 0, _NO_FP8, "--bf16 alone"),
    ("--keep-fp8-transpose-cache", 0, _NO_FP8, "--bf16 alone"),
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
    ("--use-torch-fsdp2", 0, "another flag says it", "--data-parallel-sharding-strategy optim_grads_params"),
    (
        "--torch-fsdp2-no-reshard-after-forward",
        0,
        "another flag says it",
        "--data-parallel-sharding-strategy optim_grads",
    ),
    ("--use-custom-fsdp", 0, _OLD, "--use-megatron-fsdp"),
    (
        "--enable-full-sharding-in-hsdp",
        0,
        "copies of the shards are not sharded again",
        "no --num-distributed-optimizer-instances",
    ),
    ("--num-virtual-stages-per-pipeline-rank", 1, "another flag says it", _VIRTUAL_STAGES),
    ("--pipeline-model-parallel-layout", 1, _EVEN_STAGES, _VIRTUAL_STAGES),
    ("--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers", 1, _EVEN_STAGES, _LEAVE_OUT),
    ("--account-for-embedding-in-pipeline-split", 0, _EVEN_STAGES, _LEAVE_OUT),
    ("--account-for-loss-in-pipeline-split --standalone-embedding-stage", 0, _EVEN_STAGES, _LEAVE_OUT),
    ("--pipeline-model-parallel-comm-backend", 1, "all groups have one backend", "--distributed-backend"),
    ("--hierarchical-context-parallel-sizes", "+", "context ranks form one level", "--context-parallel-size"),
    ("--hybrid-context-parallel", 0, "every sequence is spread alike", "--context-parallel-size"),
    (
        "--tensor-parallel-num-weight-shards",
        1,
        "weights are spread further by data-parallel sharding alone",
        "--data-parallel-sharding-strategy optim_grads_params",
    ),
    ("--use-tp-pp-dp-mapping", 0, "ranks are ordered tensor, context, data, pipeline", _LEAVE_OUT),
    (
        "--distribute-saved-activations",
        0,
        "what recomputation starts from is spread by sequence parallelism alone",
        "--sequence-parallel",
    ),
    ("--model-parallel-size", 1, _OLD, "--tensor-model-parallel-size"),
    ("--data-parallel-random-init", 0, "all ranks start from the same weights", _LEAVE_OUT),
    ("--check-weight-hash-across-dp-replicas-interval", 1, "copies of weights are not compared", _LEAVE_OUT),
    ("--lazy-mpu-init", 0, "process groups are made at the start", _LEAVE_OUT),
    ("--disable-gloo-process-groups", 0, "what travels between hosts' memories needs gloo", _LEAVE_OUT),
    ("--fake-process-group", 0, "ranks communicate", _LEAVE_OUT),
    (
        "--distributed-timeout-seconds-after-init",
        1,
        "there is one limit for the whole run",
        "--distributed-timeout-minutes",
    ),
    # Data and evaluation
    ("--mock-data", 0, "training needs a corpus", "`make demo`, or --data-path with a preprocessed corpus"),
    ("--train-data-path --valid-data-path --test-data-path", "+", _ONE_CORPUS, "--data-path and --split"),
    ("--per-split-data-args-path", 1, _ONE_CORPUS, "--data-path and --split"),
    ("--vocab-file --merge-file", 1, "tokenizers are files of `tokenizers`", "--tokenizer-model"),
    ("--null-tokenizer-eod-id", 1, "the tokenizer names its end-of-document token", "--eod-token"),
    ("--dataloader-inter-document-masking", 0, "another flag says it", "--reset-attention-mask"),
    ("--sft --fim-data", 0, "training is on plain text", _LEAVE_OUT),
    ("--eval-micro-batch-size --eval-global-batch-size", 1, _ONE_BATCH_SIZE, _BATCH_FLAGS),
    ("--full-validation", 0, "evaluation covers the whole split by default", "no --eval-iters"),
    ("--skip-train", 0, "the command trains", _LEAVE_OUT),
    # Checkpoints
    ("--use-checkpoint-args", 0, "the model is given by flags", "--model-preset, or the model's own flags"),
    (
        "--use-mp-args-from-checkpoint-args",
        0,
        "a checkpoint fits any layout of ranks",
        "--tensor-model-parallel-size and the like",
    ),
    ("--no-ckpt-fully-parallel-save", 0, "each rank writes what it holds", _LEAVE_OUT),
    ("--no-load-optim --no-load-rng", 0, _WHOLE_STATE, "--finetune, for a new run from the weights alone"),
    ("--no-save-optim --no-save-rng", 0, _WHOLE_STATE, _LEAVE_OUT),
    ("--ckpt-step", 1, "a run is continued from its newest complete checkpoint", _LEAVE_OUT),
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


TRANSLATED: dict[str, dict[str, str]] = {"--attention-backend": {"flash": "auto", "fused": "auto"}}
"""Our settings that have other values in Megatron, with our value for each of those."""


def strip_megatron_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (`argv` without the flags of the two tables and with our values of settings, a note on each of these).

    Reads `--flag value`, `--flag=value`, `--flag a b` (lists), and underscores for hyphens in names of flags. All other
    words are kept unchanged and in order. Raises one ValueError that names every refused flag and every value that is
    not accepted, with a line for each that gives the reason and the legal values.
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
        if flag in TRANSLATED:
            translated, note = _translate(flag, [value] if equals else _take_values(words, 1))
            rest += translated
            notes += note
            continue
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


def _translate(flag: str, values: list[str]) -> tuple[list[str], list[str]]:
    """Return (words of our setting, a note if the value was Megatron's)."""
    ours = [TRANSLATED[flag].get(value, value) for value in values]
    notes = [f"{flag} {value}: accepted as {our}" for value, our in zip(values, ours, strict=True) if value != our]
    return [flag, *ours], notes


def _take_values(words: deque[str], arity: Arity) -> list[str]:
    """Take the values that `arity` allows from the head of `words`; a word that begins with `--` is not a value."""
    limit = len(words) if arity == "+" else arity
    values: list[str] = []
    while words and len(values) < limit and not words[0].startswith("--"):
        values.append(words.popleft())
    return values


def _problem(flag: str, spec: AcceptedFlag | RefusedFlag, values: list[str]) -> str | None:
    """Return why a flag with these values ends the program; None if it does not."""
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
    """Return whether two values are the same word or the same number."""
    try:
        return float(value) == float(choice)
    except ValueError:
        return value == choice
