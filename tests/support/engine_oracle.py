"""What the engine must compute, written plainly: one process, whole batches, fp64 autograd, torch.optim's AdamW."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.model import Decoder, ModelConfig
from megatron_lfr.model.dropout import DropoutConfig
from megatron_lfr.model.loss import LossConfig
from support.dropout_oracle import Masks


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """All rows of a step: tokens, labels and mask [rows, S], and the lengths of each row's documents. Equal only to
    itself, and not to be written to."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    block_ids: list[int]
    documents: list[list[int]] | None = None
    step: int = 0


@dataclass(frozen=True)
class Step:
    """What the oracle finds in a step; sums and counts [rows] are fp64."""

    loss: float
    nll_sum: Tensor
    count: Tensor
    grad_norm: float


class Oracle:
    """A Llama with the initial weights of `Decoder(config, seed)`, trained on whole batches."""

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        optimizer: OptimizerConfig,
        loss: LossConfig | None = None,
        dropout: DropoutConfig | None = None,
    ) -> None:
        self.config, self.clip_grad, self.loss = config, optimizer.clip_grad, loss or LossConfig()
        self.dropout, self.seed = dropout or DropoutConfig(), seed
        self.weights = {n: nn.Parameter(p.detach().double()) for n, p in Decoder(config, seed).named_parameters()}
        matrices = [w for w in self.weights.values() if w.ndim == 2]
        norms = [w for w in self.weights.values() if w.ndim == 1]
        self.adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_eps,
        )

    def step(self, batch: GlobalBatch, lr: float) -> Step:
        """Train on `batch`."""
        step = self._backward(batch)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        return step

    def _backward(self, batch: GlobalBatch) -> Step:
        """Compute the gradients of all trained weights, and clip them."""
        self.adamw.zero_grad()
        logits = self._logits(batch, Masks(self.dropout, self.seed, batch.step, *batch.tokens.shape))
        nll = _cross_entropy(logits, batch)
        minimised = _cross_entropy(logits, batch, self.loss.label_smoothing)
        minimised = minimised + self.loss.z_loss_coeff * logits.exp().sum(-1).log().square()
        loss = (minimised * batch.mask).sum() / batch.mask.sum()
        loss.backward()
        limit = self.clip_grad or float("inf")
        trained = [weight for group in self.adamw.param_groups for weight in group["params"]]
        grad_norm = float(nn.utils.clip_grad_norm_(trained, limit))
        return Step(loss.item(), (nll * batch.mask).sum(1).detach(), batch.mask.double().sum(1), grad_norm)

    @torch.no_grad()
    def evaluate(self, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """Each row's summed negative log-likelihood and count."""
        nothing = Masks(DropoutConfig(), 0, 0, *batch.tokens.shape)
        return (_cross_entropy(self._logits(batch, nothing), batch) * batch.mask).sum(1), batch.mask.double().sum(1)

    def _logits(self, batch: GlobalBatch, masks: Masks) -> Tensor:
        rows, length = batch.tokens.shape
        documents = batch.documents or [[length]] * rows
        positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in documents])
        visible = torch.stack(
            [torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]) for lengths in documents]
        ).bool()
        logits = self._hidden_states(batch.tokens, positions, visible, masks) @ self._output_weight().T
        logits, cap = logits[..., : self.config.vocab_size], self.config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap if cap else logits

    def _output_weight(self) -> Tensor:
        untied = self.config.untie_embeddings_and_output_weights
        return self.weights["output.weight" if untied else "embedding.weight"]

    def _hidden_states(self, tokens: Tensor, positions: Tensor, visible: Tensor, masks: Masks) -> Tensor:
        x = F.embedding(tokens, self.weights["embedding.weight"])
        x = x * masks.of_embedding(x.shape[-1])
        for n in range(self.config.num_layers):
            layer = {k.removeprefix(f"layers.{n}."): w for k, w in self.weights.items() if k.startswith(f"layers.{n}.")}
            normed = self._norm(x, layer["attention_norm.weight"])
            kept = masks.of_attention(n, self.config.num_attention_heads)
            mixed = self._attend(normed @ layer["attention.qkv.weight"].T, positions, visible, kept)
            x = x + mixed @ layer["attention.output.weight"].T * masks.of_output(n, 1, x.shape[-1])
            normed = self._norm(x, layer["feed_forward_norm.weight"])
            gate = F.silu(normed @ layer["feed_forward.gate.weight"].T)
            y = (gate * (normed @ layer["feed_forward.up.weight"].T)) @ layer["feed_forward.down.weight"].T
            x = x + y * masks.of_output(n, 2, x.shape[-1])
        return self._norm(x, self.weights["final_norm.weight"])

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + self.config.norm_epsilon).sqrt()

    def _attend(self, qkv: Tensor, positions: Tensor, visible: Tensor, kept: Tensor) -> Tensor:
        """qkv [B, S, groups · (heads + 2) · D], each group's queries followed by its key and its value; kept: factors
        of the weights [B, all heads, S, S]."""
        groups, size = self.config.query_groups, self.config.head_dim
        heads = self.config.num_attention_heads // groups
        qkv = qkv.unflatten(-1, (groups, heads + 2, size))
        q, k = (self._rotate(part, positions) for part in (qkv[..., :heads, :], qkv[..., heads, :].unsqueeze(-2)))
        scores = torch.einsum("bsghd,btgd->bghst", q, k.squeeze(-2)) / size**0.5
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
        return torch.einsum(
            "bghst,btgd->bsghd", scores.softmax(-1) * kept.view_as(scores), qkv[..., heads + 1, :]
        ).flatten(2)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Channels i and i + D/2 of x [B, S, groups, heads, D] as a complex number, turned."""
        half = x.shape[-1] // 2
        frequencies = self.config.rotary_base ** (-torch.arange(half).double() / half)
        turn = torch.polar(torch.ones(()).double(), positions[..., None, None, None] * frequencies)
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)


class Expected:
    """An oracle of which a process computes each step once, for all layouts that take it."""

    _oracles: ClassVar[dict[tuple[Any, ...], Oracle]] = {}
    """By what an oracle is made of, and the steps that it has taken."""
    _steps: ClassVar[dict[tuple[Any, ...], Step]] = {}
    _evaluated: ClassVar[dict[tuple[Any, ...], tuple[Tensor, Tensor]]] = {}

    def __init__(self, oracle: type[Oracle], *arguments: Any) -> None:
        self._taken: tuple[Any, ...] = (oracle, repr(arguments))
        if self._taken not in self._oracles:
            self._oracles[self._taken] = oracle(*arguments)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return self._oracles[self._taken].weights

    def step(self, batch: GlobalBatch, lr: float) -> Step:
        before, self._taken = self._taken, (*self._taken, batch, lr)
        if self._taken not in self._steps:
            oracle = self._oracles[self._taken] = copy.deepcopy(self._oracles[before])
            self._steps[self._taken] = oracle.step(batch, lr)
        return self._steps[self._taken]

    def evaluate(self, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        key = (*self._taken, batch)
        if key not in self._evaluated:
            self._evaluated[key] = self._oracles[self._taken].evaluate(batch)
        return self._evaluated[key]


def _cross_entropy(logits: Tensor, batch: GlobalBatch, smoothing: float = 0.0) -> Tensor:
    """Of each token: [rows, S]."""
    return F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none", label_smoothing=smoothing)
