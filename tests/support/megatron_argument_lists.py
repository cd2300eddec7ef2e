"""The argument lists of Megatron-LM's Llama-3 example scripts, and of its GPT-3 one.

From https://github.com/NVIDIA/Megatron-LM, commit d98e8a64ddf34856e74b24714e3bedb2f5a39553 (2026-08-22):

- examples/llama/train_llama3_8b_h100_fp8.sh
- examples/megatron_fsdp/train_llama3_8b_fsdp_h100_fp8.sh
- examples/gpt3/train_gpt3_175b_distributed.sh
- examples/post_training/modelopt/conf/meta-llama/Llama-3.1-8B-Instruct.sh and Llama-3.2-1B-Instruct.sh
  (the MODEL_ARGS that finetune.sh and its neighbours begin their lists with)

The two training scripts were run with a stand-in for torchrun that prints its arguments, so a list holds the
words that pretrain_gpt.py gets: with the scripts' defaults, the working directory cut off, and for real data
`data/my_text_document` and `tokenizer`. That is why the value of --split carries quotes: the scripts keep
flag and value as one string and let the shell split it, which removes no quotes, and Megatron reads only the
numbers. Left out: examples/rl/model_configs (reinforcement learning) and examples/multimodal.
"""

from __future__ import annotations


def _argv(*parts: str) -> list[str]:
    return " ".join(parts).split()


_MODEL = """
--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
--group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192
--max-position-embeddings 8192 --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0
--attention-dropout 0.0 --hidden-dropout 0.0 --swiglu --normalization RMSNorm --init-method-std 0.0134
--attention-backend fused --apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear
"""
_OPTIMIZER = """
--micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748
--lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5
--lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16
"""
_GARBAGE_AND_EXIT = "--manual-gc --empty-unused-memory-level 1 --exit-duration-in-mins 235"
_DDP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
_FP8 = "--fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather"
_PARALLEL = "--tensor-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel"
_LOADER = "--split '99,1,0' --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1"
_LOGGING = "--log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput"


def _mock_data(name: str) -> str:
    return (
        "--mock-data --tokenizer-type NullTokenizer --vocab-size 128256 "
        f"--data-cache-path benchmark_cache_{name} --tiktoken-pattern v2 {_LOADER}"
    )


def _real_data(name: str) -> str:
    return (
        "--data-path data/my_text_document --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer "
        f"--data-cache-path benchmark_cache_{name} {_LOADER} --vocab-size 128256"
    )


def _folders(name: str) -> str:
    return (
        f"--distributed-timeout-minutes 60 --save checkpoints/{name} --load checkpoints/{name} "
        f"--tensorboard-dir tensorboard_logs/{name}"
    )


def _llama(data: str) -> list[str]:
    training = f"{_OPTIMIZER} --grad-reduce-in-bf16 --cross-entropy-loss-fusion --calculate-per-token-loss"
    logging = f"{_LOGGING} --profile --profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist"
    folders = _folders("llama3_8b_fp8")
    return _argv(_MODEL, training, _GARBAGE_AND_EXIT, _DDP, _FP8, _PARALLEL, data, logging, folders)


_MEGATRON_FSDP = """
--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params --no-gradient-accumulation-fusion
--calculate-per-token-loss --init-model-with-meta-device --ckpt-format fsdp_dtensor --use-nccl-ub
--fsdp-double-buffer --fsdp-manual-registration
"""
_NSYS = "--profile --profile-step-start 8 --profile-step-end 12 --profile-ranks 0 --record-memory-history"


def _fsdp(data: str, sharding: str = _MEGATRON_FSDP, profile: str = "") -> list[str]:
    training = f"{_OPTIMIZER} --cross-entropy-loss-fusion --no-check-for-nan-in-loss-and-grad {_GARBAGE_AND_EXIT}"
    logging = f"{_LOGGING} --logging-level 20 {_folders('llama3_8b_fsdp_fp8')}"
    return _argv(_MODEL, training, sharding, _DDP, profile, _FP8, _PARALLEL, data, logging)


def _modelopt(before_norm: str, sizes: str, after_sizes: str) -> list[str]:
    return _argv(
        "--save-interval 100000 --micro-batch-size 1 --bf16 --no-masked-softmax-fusion --disable-bias-linear",
        before_norm,
        "--no-rope-fusion --no-position-embedding --normalization RMSNorm --swiglu",
        sizes,
        "--num-attention-heads 32 --group-query-attention --num-query-groups 8 --seq-length 4096",
        "--max-position-embeddings 8192",
        "--tokenizer-type HuggingFaceTokenizer --make-vocab-size-divisible-by 1",
        f"--use-mcore-models {after_sizes} --rotary-base 500000 --use-rope-scaling",
    )


LLAMA3_SCRIPTS: dict[str, list[str]] = {
    "train_llama3_8b_h100_fp8.sh, mock data": _llama(_mock_data("llama3_8b_fp8")),
    "train_llama3_8b_h100_fp8.sh, real data": _llama(_real_data("llama3_8b_fp8")),
    "train_llama3_8b_fsdp_h100_fp8.sh, mock data": _fsdp(_mock_data("llama3_8b_fsdp_fp8")),
    "train_llama3_8b_fsdp_h100_fp8.sh, real data": _fsdp(_real_data("llama3_8b_fsdp_fp8")),
    "train_llama3_8b_fsdp_h100_fp8.sh, real data, NSYS_PROFILE=1": _fsdp(
        _real_data("llama3_8b_fsdp_fp8"), profile=_NSYS
    ),
    "train_llama3_8b_fsdp_h100_fp8.sh, real data, USE_MEGATRON_FSDP=0": _fsdp(
        _real_data("llama3_8b_fsdp_fp8"), sharding=""
    ),
    "Llama-3.1-8B-Instruct.sh": _modelopt(
        "--untie-embeddings-and-output-weights --use-rotary-position-embeddings --rotary-percent 1.0",
        "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336",
        "",
    ),
    "Llama-3.2-1B-Instruct.sh": _modelopt(
        "--use-rotary-position-embeddings",
        "--num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192",
        "--rotary-percent 1.0",
    ),
}
"""Script and branch to the words that Megatron's parser gets."""

GPT3_SCRIPT = _argv(
    "--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048",
    "--attention-backend auto --micro-batch-size 1 --global-batch-size 1536 --rampup-batch-size 16 16 5859375",
    "--train-iters 500000 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006",
    "--clip-grad 1.0 --fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001",
    "--lr-decay-iters 430000 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16",
    "--data-path data/my_text_document --vocab-file vocab.json --merge-file merges.txt --split 949,50,1",
    "--log-interval 100 --save-interval 10000 --eval-interval 1000 --save checkpoints --load checkpoints",
    "--eval-iters 10 --tensorboard-dir tensorboard_logs",
)
"""Words of train_gpt3_175b_distributed.sh, with the GPT-2 family's parts to be given by --model-preset gpt2."""

_REFUSED_EVERYWHERE = {
    *("--decoupled-lr", "--decoupled-min-lr"),
    *("--fp8-format", "--fp8-amax-history-len", "--fp8-amax-compute-algo", "--fp8-param-gather"),
}
_REFUSED_LLAMA = _REFUSED_EVERYWHERE | {"--grad-reduce-in-bf16"}
_REFUSED_MOCK = {"--mock-data", "--tokenizer-type"}

REFUSED_IN_LLAMA3_SCRIPTS: dict[str, set[str]] = {
    "train_llama3_8b_h100_fp8.sh, mock data": _REFUSED_LLAMA | _REFUSED_MOCK,
    "train_llama3_8b_h100_fp8.sh, real data": _REFUSED_LLAMA,
    "train_llama3_8b_fsdp_h100_fp8.sh, mock data": _REFUSED_EVERYWHERE | _REFUSED_MOCK,
    "train_llama3_8b_fsdp_h100_fp8.sh, real data": _REFUSED_EVERYWHERE,
    "train_llama3_8b_fsdp_h100_fp8.sh, real data, NSYS_PROFILE=1": _REFUSED_EVERYWHERE | {"--record-memory-history"},
    "train_llama3_8b_fsdp_h100_fp8.sh, real data, USE_MEGATRON_FSDP=0": _REFUSED_EVERYWHERE,
    "Llama-3.1-8B-Instruct.sh": set(),
    "Llama-3.2-1B-Instruct.sh": set(),
}
"""What this package refuses of each list: the flag itself, or its value (--tokenizer-type)."""


def split_flags(argv: list[str]) -> list[list[str]]:
    """`argv` cut before each flag: a list of [flag, value, ...]."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--"):
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups
