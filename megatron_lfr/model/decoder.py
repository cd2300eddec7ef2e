"""The decoder: embedding, transformer layers, final norm and loss. ModelConfig says what they are made of.

By default they are those of Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971; grouped queries and positions
as in Llama 3); docs/models.md lists the families that it can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_lfr.kernels import BlockStats, block_cross_entropy
from megatron_lfr.kernels.block_cross_entropy import Mode
from megatron_lfr.kernels.matmul import matmul
from megatron_lfr.model.attention import AttentionBackend, attention_mask
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.dropout import DropoutConfig, draw, draw_sample_keys, drop
from megatron_lfr.model.fused import LayerKernels
from megatron_lfr.model.layers import RecomputeGranularity, Tokens, TransformerLayer, make_norm
from megatron_lfr.model.loss import LossConfig
from megatron_lfr.model.norm import Norm, RMSNormAcrossHeads
from megatron_lfr.model.rope import grows, rope_tables
from megatron_lfr.parallel.collectives import group_size
from megatron_lfr.parallel.context import take_local
from megatron_lfr.parallel.layers import (
    PositionEmbedding,
    RowParallelLinear,
    ShardedWeight,
    TensorParallel,
    VocabParallelEmbedding,
    local_rows,
)
from megatron_lfr.parallel.pipeline import Stage, make_stage
from megatron_lfr.parallel.vector_math import settle_vector_math

_SCORED_ROWS = 1024
"""Number of tokens whose logits `score_next` holds at a time."""


class Loss(NamedTuple):
    """Losses that the last stage computes from a micro-batch of B rows."""

    loss: Tensor
    """Sum of weight · loss over the tokens: an fp32 scalar. The loss is LossConfig's while gradients are computed, else
    the plain negative log-likelihood."""
    nll_sum: Tensor
    """Each row's summed negative log-likelihood, in nats: fp32 [B]."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    """Number of tokens in each row's sum: fp32 [B]."""


class Decoder(nn.Module):
    """One pipeline stage of a model (by default the whole model) on one rank; its initial weights depend on `seed`
    only.

    Weights are fp32; activations are `compute_dtype`. `recompute_granularity` drops the activations of whole layers
    ("full") or of attention between its linear layers ("selective") and computes them again in the backward. Layers
    keep their global numbers, so that names do not depend on the layout. seed None leaves the weights undefined, to be
    loaded. `loss` is what training minimises; it changes nothing where no gradient is computed. `dropout` changes
    nothing where forward is given no sample_keys. Raises ValueError for a configuration that does not fit.
    """

    rope_cos: Tensor | None
    rope_sin: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        seed: int | None,
        *,
        tp: TensorParallel | None = None,
        context_group: ProcessGroup | None = None,
        stage: Stage | None = None,
        compute_dtype: torch.dtype = torch.float32,
        recompute_granularity: RecomputeGranularity | None = None,
        kernels: LayerKernels | None = None,
        loss: LossConfig | None = None,
        dropout: DropoutConfig | None = None,
        dropout_seed: int = 0,
        attention_backend: AttentionBackend = "sdpa",
        loss_mode: Mode = "auto",
    ) -> None:
        super().__init__()
        settle_vector_math()  # or a table of angles is wrong in one process of some 300
        tp, kernels = tp or TensorParallel(), kernels or LayerKernels()
        config.validate(tp.size)
        rows = config.padded_vocab_size
        assert config.vocab_size is not None
        self.config, self.tp, self.context_group = config, tp, context_group
        self.stage = stage = stage or make_stage(config.num_layers)
        self.loss_config = loss or LossConfig()
        self.dropout, self.dropout_seed = dropout or DropoutConfig(), dropout_seed
        self.vocab_size, self.compute_dtype, self.loss_mode = config.vocab_size, compute_dtype, loss_mode
        self.attention_backend = attention_backend
        shape = (config.vocab_size, config.hidden_size)
        tied = not config.untie_embeddings_and_output_weights
        self.embedding: VocabParallelEmbedding | None = None
        self.position_embedding: PositionEmbedding | None = None
        self.final_norm: Norm | None = None
        self.output: ShardedWeight | None = None
        if stage.is_first or (stage.is_last and tied):
            self.embedding = VocabParallelEmbedding(*shape, tp, rows)
        if stage.is_first and not config.has_rope:
            self.position_embedding = PositionEmbedding(config.max_position_embeddings, config.hidden_size, tp)
        self.layers = nn.ModuleDict(
            {
                str(number): TransformerLayer(config, tp, context_group, recompute_granularity, kernels, self.dropout)
                for number in range(stage.first_layer, stage.end_layer)
            }
        )
        if stage.is_last:
            self.final_norm = make_norm(config, config.hidden_size, kernels)
            self.output = None if tied else ShardedWeight(shape, 0, tp, rows)
        for name, table in zip(("rope_cos", "rope_sin"), self._rope_tables(), strict=True):
            self.register_buffer(name, table, persistent=False)
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw this rank's part of the initial weights from a normal distribution, whose standard deviation is divided
        by √(2 · layers) where a layer writes into the residual stream. Norms begin as 1, biases as 0."""
        for name, module in self.named_modules():
            if isinstance(module, ShardedWeight):
                module.init_normal(f"{name}.weight", seed, self._init_std(module))
            elif isinstance(module, Norm | RMSNormAcrossHeads):
                for kind, parameter in module.named_parameters():
                    local_rows(parameter)[0].fill_(float(kind == "weight"))

    @torch.no_grad()
    def init_part(self, name: str, part: Tensor, start: Sequence[int], seed: int) -> None:
        """Draw a part of an initial weight, with the values that `init_weights` gives it: `part`, fp32, is the
        rectangle of the full weight whose first element is at `start`."""
        layer, _, kind = name.rpartition(".")
        module = self.get_submodule(layer)
        if isinstance(module, ShardedWeight) and kind == "weight":
            module.init_part(part, start, name, seed, self._init_std(module))
        else:
            part.fill_(float(kind == "weight"))

    def _init_std(self, module: ShardedWeight) -> float:
        scale = 1 / math.sqrt(2 * self.config.num_layers) if isinstance(module, RowParallelLinear) else 1.0
        return self.config.init_method_std * scale

    def empty_on(self, device: torch.device, then: Callable[[nn.Module], object] | None = None) -> None:
        """Allocate memory on a device for a model that was made on the meta device. The weights are undefined.

        then: is called with each module as soon as it has memory, before the next one gets any.
        """
        if then is None:
            self.to_empty(device=device)
        else:
            for module in self.modules():
                module.to_empty(device=device, recurse=False)
                then(module)
        for buffer, table in zip((self.rope_cos, self.rope_sin), self._rope_tables(), strict=True):
            if buffer is not None and table is not None:
                buffer.copy_(table)

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows of the output embedding: [padded vocabulary / ranks, H]."""
        weight = self.embedding if self.output is None else self.output
        assert weight is not None
        return weight.weight

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        token_weight: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        sample_keys: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Run a micro-batch of B sequences of S tokens; returns the fields of its Loss, or what the next stage takes.

        x: tokens int64 [B, S] on the first stage, else what the stage before returned, [N, H] in `compute_dtype`.
        labels int64 and token_weight fp32 [B, S], see block_cross_entropy; position_ids int64 [B, S], by default
        0, 1, ...; document_ids int64 [B, S]: a token attends to the earlier tokens of its own document only, by default
        to all earlier tokens of its row; sample_keys int64 [B]: what dropout's masks follow from, see
        draw_sample_keys, by default nothing is dropped. All stages and context-parallel ranks are given whole
        sequences.
        """
        rows = self._positions(labels)
        hidden = self._run_layers(x, rows, position_ids, document_ids, sample_keys)
        if not self.stage.is_last:
            return hidden
        labels, token_weight = (take_local(tensor, self.context_group) for tensor in (labels, token_weight))
        loss, stats = self._loss(hidden, labels, token_weight)
        return loss, stats.nll_sum, stats.count  # PyTorch's pipelines accept plain tuples only

    def hidden_states(
        self, tokens: Tensor, position_ids: Tensor | None = None, document_ids: Tensor | None = None
    ) -> Tensor:
        """Compute the hidden states [B, S, H] that the output embedding is applied to, for a model in one stage on one
        rank."""
        hidden = self._run_layers(tokens, self._positions(tokens), position_ids, document_ids)
        return hidden.view(*tokens.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits fp32 [N, vocabulary] of `hidden_states` [N, H], for a model in one stage on one rank."""
        logits, cap = matmul(hidden, self.output_weight.to(hidden.dtype).t()), self.config.final_logit_softcapping
        logits = logits[:, : self.vocab_size]
        return cap * torch.tanh(logits / cap) if cap else logits

    def score_next(self, tokens: Tensor, labels: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Predict what follows the N of the tokens [B, S] that `where` bool [B, S] marks, for a model in one stage on
        one rank: (log-probability of the label, fp32 [N]; the likeliest token, int64 [N]), in row-major order."""
        hidden, labels = self.hidden_states(tokens)[where], labels[where]
        logprobs, likeliest = [], []
        for rows, targets in zip(torch.split(hidden, _SCORED_ROWS), torch.split(labels, _SCORED_ROWS), strict=True):
            logits = self.logits(rows)
            logprobs.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
            likeliest.append(logits.argmax(-1))
        return torch.cat(logprobs), torch.cat(likeliest)

    def draw_sample_keys(self, step: int, rows: slice, device: torch.device) -> Tensor | None:
        """Return what forward takes as sample_keys for `rows` of a step's global batch; None where training drops
        nothing."""
        return draw_sample_keys(self.dropout_seed, step, rows, device) if self.dropout.drops else None

    def _run_layers(
        self,
        x: Tensor,
        rows: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        sample_keys: Tensor | None = None,
    ) -> Tensor:
        length = len(rows) * group_size(self.context_group)
        positions = rows.unsqueeze(0) if position_ids is None else position_ids[:, rows]
        window = self.config.window(length)
        mask = attention_mask(self.attention_backend, rows, length, document_ids, window, self.compute_dtype)
        tokens = Tokens(rows, self._rope(positions, length), mask)
        if self.stage.is_first:
            x = self._embed(take_local(x, self.context_group), positions)
            if sample_keys is not None and self.dropout.hidden_dropout:
                keys = tokens.token_keys(draw(sample_keys, 0))
                x = drop(x, self.tp.take_local(keys), self.dropout.hidden_dropout)
        for number, layer in self.layers.items():
            # Keys are tensors: a compiled layer must not depend on its number.
            x = layer(x, tokens if sample_keys is None else tokens._replace(keys=draw(sample_keys, int(number) + 1)))
        return x if self.final_norm is None else self.final_norm(x)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embed this rank's tokens [B, S] at positions [B or 1, S]: [N, H]."""
        assert self.embedding is not None
        x: Tensor = self.embedding(tokens.flatten())
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions.expand_as(tokens).flatten())
        return x.to(self.compute_dtype)

    def _loss(self, hidden: Tensor, labels: Tensor, token_weight: Tensor) -> tuple[Tensor, BlockStats]:
        # Without a gradient, only the blocks' plain losses matter, so the loss is plain as well.
        minimised = self.loss_config if torch.is_grad_enabled() else LossConfig()
        return block_cross_entropy(
            hidden,
            self.output_weight,
            labels,
            token_weight,
            vocab_size=self.vocab_size,
            tp_group=self.tp.group,
            sequence_parallel=self.tp.sequence,
            z_loss=minimised.z_loss_coeff,
            label_smoothing=minimised.label_smoothing,
            logit_softcap=self.config.final_logit_softcapping,
            mode=self.loss_mode,
        )

    def _positions(self, tokens: Tensor) -> Tensor:
        """Return the positions of this rank's tokens in their sequences [B, S]: int64 [S / context-parallel ranks]."""
        length, longest = tokens.shape[1], self.config.max_position_embeddings
        if length > longest:
            raise ValueError(f"a sequence of {length} tokens is longer than --max-position-embeddings {longest}")
        return take_local(torch.arange(length, device=tokens.device).unsqueeze(0), self.context_group)[0]

    def _rope(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor] | None:
        """Return cos and sin at each position [B or 1, S] of sequences of `length` tokens: [B or 1, S, 1, 1, head_dim];
        None without rotary positions."""
        tables = self.rope_cos, self.rope_sin
        if grows(self.config, length):
            tables = self._rope_tables(length)
        cos, sin = (None if table is None else table.to(positions.device)[positions] for table in tables)
        return None if cos is None or sin is None else (cos[:, :, None, None], sin[:, :, None, None])

    def _rope_tables(self, length: int = 0) -> tuple[Tensor | None, Tensor | None]:
        return rope_tables(self.config, length) if self.config.has_rope else (None, None)
