"""The layers of each pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One of `count` consecutive parts of a model: the layers [first_layer, end_layer), by their global numbers."""

    index: int
    count: int
    first_layer: int
    end_layer: int

    @property
    def is_first(self) -> bool:
        """Whether the embedding belongs to this stage."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the loss belongs to this stage."""
        return self.index == self.count - 1


def make_stage(num_layers: int, count: int = 1, index: int = 0) -> Stage:
    """Make stage `index` of `count` that share the layers evenly. Early stages take one layer more where there is a
    remainder, as the last one also has the loss."""
    size, more = divmod(num_layers, count)
    first = index * size + min(index, more)
    return Stage(index, count, first, first + size + (index < more))


def local_stages(num_layers: int, count: int, rank: int, ranks: int) -> list[Stage]:
    """Return the stages of pipeline rank `rank`: every `ranks`-th one."""
    return [make_stage(num_layers, count, index) for index in range(rank, count, ranks)]
