"""A model with adapters, written plainly: each matrix is W + s · B A, whose rows are in the order of our layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.engine.sharded_lora_rite import rite_config
from megatron_lfr.model import Decoder, ModelConfig
from megatron_lfr.model.lora import LoRAConfig, add_adapters, init_adapters
from megatron_lfr.model.loss import LossConfig
from megatron_lfr.parallel.lora import LoRAFactor
from support.engine_oracle import GlobalBatch, Oracle, Step
from support.rite_oracle import RiteOracle

MODULES = {
    "attention.output": "o",
    "feed_forward.gate": "gate",
    "feed_forward.up": "up",
    "feed_forward.down": "down",
}


class LoRAOracle(Oracle):
    """The adapters of a Llama, trained on whole batches; `weights` holds them alone between steps."""

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        optimizer: OptimizerConfig,
        lora: LoRAConfig,
        loss: LossConfig | None = None,
    ) -> None:
        super().__init__(config, seed, optimizer, loss)
        self.base = {name: weight.detach() for name, weight in self.weights.items()}
        model = Decoder(config, seed)
        add_adapters(model, lora, torch.float32)
        init_adapters(model, seed)
        self.scale = lora.lora_alpha / (lora.lora_rank or 0)
        self.adapters = {n: nn.Parameter(p.detach().double()) for n, p in model.named_parameters() if p.requires_grad}
        self.weights = self.adapters
        self.adamw = torch.optim.AdamW(
            list(self.adapters.values()),
            weight_decay=optimizer.weight_decay,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_eps,
        )
        self.rite = RiteOracle(**vars(rite_config(optimizer))) if optimizer.optimizer == "lora-rite" else None

    def step(self, batch: GlobalBatch, lr: float) -> Step:
        if self.rite is None:
            return super().step(batch, lr)
        step = self._backward(batch)
        names = [name.removesuffix(".A.weight") for name in self.adapters if name.endswith(".A.weight")]
        pairs = [(self.adapters[f"{name}.B.weight"], self.adapters[f"{name}.A.weight"]) for name in names]
        new = self.rite.step(
            [(b.detach().numpy(), a.detach().numpy().T) for b, a in pairs],
            [(b.grad.numpy(), a.grad.numpy().T) for b, a in pairs],  # type: ignore[union-attr]
            lr,
        )
        for (b, a), (new_b, new_a) in zip(pairs, new, strict=True):
            b.data, a.data = torch.from_numpy(new_b), torch.from_numpy(new_a.T.copy())
        return step

    def _logits(self, batch: GlobalBatch, *masks: Any) -> Tensor:
        self.weights = {name: weight + self._delta(name) for name, weight in self.base.items()}
        logits = super()._logits(batch, *masks)
        self.weights = self.adapters
        return logits

    def _output_weight(self) -> Tensor:
        return self.base["output.weight" if self.config.untie_embeddings_and_output_weights else "embedding.weight"]

    def _delta(self, name: str) -> Tensor | float:
        layer = name.removesuffix(".weight")
        if layer.endswith("attention.qkv"):
            return self._qkv_delta(layer)
        module = MODULES.get(".".join(layer.split(".")[2:]))
        return 0.0 if module is None else self._product(layer, module)

    def _product(self, layer: str, module: str) -> Tensor | float:
        factors = [self.adapters.get(f"{layer}.lora.{module}.{factor}.weight") for factor in "BA"]
        return 0.0 if factors[0] is None or factors[1] is None else self.scale * factors[0] @ factors[1]

    def _qkv_delta(self, layer: str) -> Tensor:
        groups, size = self.config.query_groups, self.config.head_dim
        heads, rows = self.config.num_attention_heads // groups, []
        for group in range(groups):
            for module, count in (("q", heads), ("k", 1), ("v", 1)):
                delta = self._product(layer, module)
                part = torch.zeros(count * size, self.config.hidden_size, dtype=torch.float64)
                if isinstance(delta, Tensor):
                    part = delta[group * count * size : (group + 1) * count * size]
                rows.append(part)
        return torch.cat(rows)


@contextmanager
def random_b() -> Iterator[None]:
    """Let B begin as numbers of ±0.3, not as 0."""
    original = LoRAFactor.__init__

    def init(self: LoRAFactor, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        self.bound = self.bound or 0.3

    with patch.object(LoRAFactor, "__init__", init):
        yield
