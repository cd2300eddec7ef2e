"""Checks that our model computes from a checkpoint the logits that transformers computes from a Hugging Face folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from megatron_lfr.data.corpus.tokenizer import Tokenizer
from megatron_lfr.huggingface.adapters import WeightReader
from megatron_lfr.model import Decoder, ModelConfig

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest logit. Both compute in fp32 and differ only in the order of sums, by
some 1e-6; a misplaced weight, a transposed matrix or another position's angle makes a difference as large as the
logits."""

_ROWS, _LENGTH, _SEED = 4, 128, 1
_TEXTS = (
    "The quick brown fox, 1234567 times; it's over.",
    " leading and  double spaces ",
    "def f(x):\n    return x\n\n\n\tdone",
    "Grüße, ça va? Привет, 日本語 🙂",
)


def check_transformers() -> None:
    """Raise ValueError, which says what to do, where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("--verify: compares with transformers, which is not installed; pip install transformers")


def verify(stored: WeightReader, config: ModelConfig, hf_folder: Path, dtype: torch.dtype) -> str:
    """Compare the logits of random tokens (with a fixed seed), in fp32, and return the result as a sentence.

    `dtype`: type of the weights in `hf_folder`, to which ours are rounded first. If our logits are capped, which
    transformers' models do not do, their logits are capped here. Raises ValueError where the two differ by more than
    TOLERANCE.
    """
    assert config.vocab_size is not None
    shape = (_ROWS, min(_LENGTH, config.max_position_embeddings))
    tokens = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(_SEED))
    ours, theirs = _our_logits(stored, config, tokens, dtype), _their_logits(hf_folder, tokens)
    if cap := config.final_logit_softcapping:
        theirs = theirs.div(cap).tanh().mul(cap)
    if ours.shape != theirs.shape:
        raise ValueError(f"--verify: transformers returns logits {list(theirs.shape)}, ours are {list(ours.shape)}")
    difference, scale = (ours - theirs).abs().max().item(), ours.abs().max().item()
    comparison = (
        f"logits of {tokens.numel()} random tokens: largest difference from transformers {difference:.2e}, "
        f"largest logit {scale:.3g}"
    )
    if not difference <= TOLERANCE * scale:  # also true for NaN
        raise ValueError(
            f"--verify: {comparison}; more than {TOLERANCE:g} of it is no rounding: the two are not the same model"
        )
    return comparison


def compare_tokenizers(tokenizer: Tokenizer, hf_folder: Path) -> str:
    """Return a sentence on whether transformers encodes some texts as our tokenizer does, without added tokens. Its
    tokenizer classes may not follow tokenizer.json."""
    from transformers import AutoTokenizer

    ours = tokenizer.encode_batch(list(_TEXTS))
    try:
        other = AutoTokenizer.from_pretrained(str(hf_folder), local_files_only=True)
        theirs = [other(text, add_special_tokens=False).input_ids for text in _TEXTS]
    except Exception as error:  # its classes raise errors of any kind
        return f"note: transformers does not read the tokenizer ({type(error).__name__}: {error})"
    differing = [text for text, ids, their_ids in zip(_TEXTS, ours, theirs, strict=True) if ids != their_ids]
    if differing:
        return f"note: tokens of {differing[0]!r} differ from those of transformers' {type(other).__name__}"
    return f"tokens of {len(_TEXTS)} texts: as transformers'"


@torch.no_grad()
def _our_logits(stored: WeightReader, config: ModelConfig, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    model = Decoder(config, seed=None)
    for name, parameter in model.named_parameters():
        parameter.copy_(stored.read(f"model.{name}", tuple(parameter.shape)).to(dtype))
    return model.logits(model.hidden_states(tokens).flatten(0, 1)).view(*tokens.shape, -1)


@torch.no_grad()
def _their_logits(folder: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits
