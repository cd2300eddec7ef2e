"""The C++ core (csrc/). Results depend on the arguments alone: the same bits for any number of threads.

num_threads 0 means one for each core. Ids are uint32 where the number of blocks allows it, uint64 otherwise. Scores are
fp32 [n_blocks], higher is harder, NaN where a block has none; an infinite one raises ValueError.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.unsignedinteger[Any]]
Scores = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

class IndexFile:
    """A Megatron .idx file whose every bound was checked. ValueError names the file and the fault."""

    dtype_code: int
    item_size: int
    num_sequences: int
    num_documents: int
    num_tokens: int
    def __init__(self, path: str) -> None: ...
    def token_offset(self, document: int) -> int:
        """Position of a document's first token; of `num_documents`: the number of tokens."""
    def sequence_lengths(self, first: int, last: int) -> npt.NDArray[np.int32]:
        """Lengths in tokens of the sequences [first, last)."""

class TokenFile:
    """A .bin file of exactly `num_tokens` tokens of `item_size` bytes."""

    def __init__(self, path: str, item_size: int, num_tokens: int) -> None: ...
    def read(
        self,
        starts: npt.NDArray[np.int64],
        length: int,
        out: npt.NDArray[np.int64],
        dtype_code: int,
        num_threads: int = 1,
    ) -> None:
        """Row r of `out` [rows, length] becomes the tokens from position starts[r] on; ValueError outside the file."""

def permutation(n: int, seed: int, num_threads: int = 0) -> Ids:
    """0 ... n-1, uniformly shuffled."""

def shuffle_visits(visits: npt.NDArray[np.uint32], seed: int, num_threads: int = 0) -> Ids:
    """Block i visits[i] times, uniformly shuffled."""

def threshold(scores: Scores, drop: float, num_threads: int = 0) -> tuple[float, int, int]:
    """(cut, tie quota, dropped): dropping floor(drop * scored) blocks leaves scores from `cut` on, and of those that
    equal it, all but the first `tie quota` by id."""

def order_threshold(scores: Scores, drop: float, keep_unseen: bool, draws: int, seed: int, num_threads: int = 0) -> Ids:
    """Passes over what `threshold` keeps, each shuffled anew, the last one cut short: [draws]."""

def order_visits(
    scores: Scores,
    cuts: Doubles,
    mass: Doubles,
    unseen_mass: float,
    cap: float,
    draws: int,
    seed: int,
    num_threads: int = 0,
) -> Ids:
    """Systematic weighted sampling, shuffled: block i floor(e_i) or ceil(e_i) times, e_i = draws x its probability.

    A block's cluster is the number of ascending `cuts` that are <= its score; `mass` [clusters] is each cluster's share
    of the draws, up to a factor (0: left out); within it, weight is exp(min(score, cap)). Unscored blocks are a cluster of
    their own, of equal weights and `unseen_mass`. ValueError where nothing can be drawn.
    """

def order_choice(
    scores: Scores,
    cuts: Doubles,
    mass: Doubles,
    unseen_mass: float,
    cap: float,
    draws: int,
    seed: int,
    num_threads: int = 0,
) -> Ids:
    """Weighted choice without replacement, shuffled, with the weights of `order_visits`. Where more is drawn than there
    is, whole shuffled passes come first."""

def cluster(
    scores: Scores, k: int = 8, cap: float = 700.0, bins: int = 4096, num_threads: int = 0
) -> tuple[Doubles, npt.NDArray[np.int64], Doubles, int, float]:
    """Exact 1-D k-means of the scores on a histogram: (cuts, counts, mean of exp(min(score, cap)) a cluster, unscored
    blocks, mean squared distance). Fewer than k clusters where fewer bins are occupied."""

def percentile(scores: Scores, q: float, num_threads: int = 0) -> float:
    """The score at rank ceil(q * scored), counted from 1."""

def order_hash(ids: Ids, num_threads: int = 0) -> int:
    """64-bit hash of a sequence of ids, uint32 or uint64."""
