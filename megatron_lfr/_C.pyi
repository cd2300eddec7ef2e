"""The C++ core (csrc/). Results depend on the arguments alone: the same bits for any number of threads.

num_threads: at most 4096; 0: one for each core. seed: any u64. Ids are uint32 where the number of blocks allows it,
uint64 otherwise. Scores are fp32 [n_blocks], higher is harder, NaN where a block has none; an infinite one is an error.
Arrays must be contiguous and of the type that is given here; they are never copied. Illegal arguments raise ValueError,
which names the argument; files that cannot be read raise OSError. All functions release the GIL while they work.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.unsignedinteger[Any]]
Scores = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

class IndexFile:
    """A Megatron .idx file, all fields of which are checked when it is opened; ValueError names the file and the fault.

    Entries are read from the file when needed, so the memory does not grow with it.
    """

    @property
    def dtype_code(self) -> int:
        """Megatron's code of the token type: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16."""
    @property
    def item_size(self) -> int:
        """Size of a token in bytes."""
    @property
    def num_sequences(self) -> int: ...
    @property
    def num_documents(self) -> int:
        """Number of documents: one less than the entries of the document index."""
    @property
    def num_tokens(self) -> int:
        """Sum of the lengths of all sequences."""
    def __init__(self, path: str) -> None: ...
    def token_offset(self, document: int) -> int:
        """Return the position of a document's first token; for `num_documents`, the number of tokens."""
    def sequence_lengths(self, first: int, last: int) -> npt.NDArray[np.int32]:
        """Return the lengths, in tokens, of the sequences [first, last)."""

class TokenFile:
    """A .bin file of exactly `num_tokens` tokens of `item_size` bytes."""

    def __init__(self, path: str, item_size: int, num_tokens: int) -> None: ...
    def read(self, starts: npt.NDArray[np.int64], out: npt.NDArray[Any], num_threads: int = 1) -> None:
        """Read the tokens from position starts[r] on into row r of `out` [rows, length], as they are stored.

        `out` must have the stored type, or another one of the same size. ValueError for positions outside the file.
        """

def permutation(n: int, seed: int | Sequence[int], num_threads: int = 0, samples: int | None = None) -> Ids:
    """Shuffle 0 ... n-1 uniformly.

    samples: how many ids to return, as passes over all of them, each shuffled by the next of the seeds; the last may be
    partial. None means one pass.
    """

def shuffle_visits(
    visits: npt.NDArray[np.uint32], seed: int | Sequence[int], num_threads: int = 0, samples: int | None = None
) -> Ids:
    """Shuffle visits[i] times block i uniformly; `samples` is as in `permutation`."""

Tail = tuple[float, int, int]
"""(cut, tie quota, dropped) at one end of the scores."""

def threshold(scores: Scores, drop: float, num_threads: int = 0, drop_hardest: float = 0.0) -> tuple[Tail, Tail, int]:
    """Drop the lowest floor(drop * scored) scores, and the highest floor(drop_hardest * scored), but never all; equal
    ones are ranked by id. Both shares are in [0, 1), and below 1 together.

    Returns (lowest tail, highest tail, scored). Kept are the scores between the cuts; of those that equal the lower
    one, all but the first `tie quota` by id, of those that equal the upper one, all but the last. A share counts as the
    decimal that was written: 0.29 of 100 is 29. The cuts are -inf and inf where no block has a score, the upper one
    also where drop_hardest is 0.
    """

def order_threshold(
    scores: Scores,
    drop: float,
    keep_unseen: bool,
    samples: int,
    seed: int,
    num_threads: int = 0,
    drop_hardest: float = 0.0,
) -> Ids:
    """Make passes over the blocks that `threshold` keeps, and over unscored ones if `keep_unseen`, each shuffled anew.

    Returns ids [samples]; the last pass may be partial. ValueError where nothing is kept and samples > 0.
    """

class BlockWeights:
    """Clusters of blocks and the weights of blocks within them, for `order_visits` and `order_choice`.

    The cluster of a block is the number of ascending `cuts` (at most 63) that are <= its score. Within a cluster, its
    weight follows from its score by a rule. "perplexity": exp(min(score, cap)), or about e^-80 of the cluster's largest
    weight if that is more; cap is rounded to fp32, and may be inf. "uniform": 1. "capped": 1 up to the score `low`, 3
    from `high` on, linear between. Unscored blocks are another cluster, of weight 1. All is multiplied by `factors`,
    fp32 [n_blocks] in [0, 1], and blocks of factor 0 are in no cluster. Scores and factors are referred to, not copied,
    and must not change.
    """

    def __init__(
        self,
        scores: Scores,
        cuts: Doubles | Sequence[float],
        cap: float,
        num_threads: int = 0,
        rule: str = "perplexity",
        low: float = 0.0,
        high: float = 0.0,
        factors: Scores | None = None,
    ) -> None: ...
    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Number of blocks of each cluster [cuts + 1]."""
    @property
    def unseen(self) -> int:
        """Number of blocks without a score."""
    def mean_weights(self, num_threads: int = 0) -> Doubles:
        """Return the mean weight in each cluster and, last, of the unscored blocks [cuts + 2], to 3e-7; 0 for an empty
        one. Those of the rule "capped" are divided by 3."""

def temper_weights(
    weights: npt.NDArray[np.float32], power: float, cap: float, num_threads: int = 0
) -> npt.NDArray[np.float32]:
    """Raise weights [n] >= 0 to a power in (0, 16], let none be more than `cap` >= 1 times the mean of the result, and
    return them relative to the largest, in [0, 1]: 0 where a weight is 0 and nowhere else. ValueError where all are."""

def take_turns(
    groups: npt.NDArray[np.uint32], turn: int, logarithmic: bool, factors: Scores | None = None
) -> npt.NDArray[np.uint32]:
    """Choose the copies that count in a turn, as 1 in an array of 0 and 1 [n_blocks]: of the blocks with the same
    number in `groups`, one, or with `logarithmic` 1 + floor(log2 n) of n. Over n turns, each counts equally often. A
    block whose factor is 0 is no copy of anything, and does not count. The memory goes with the largest number."""

def visits_in_passes(
    factors: Scores, first: int, passes: int, seed: int, num_threads: int = 0
) -> npt.NDArray[np.uint32]:
    """Return the visits of each block [n_blocks] in `passes` passes from pass `first` on, by factors in [0, 1]: block i
    comes in a share factors[i] of the passes, spread evenly. In the first k of them, it comes k x factors[i] times,
    rounded up or down; the seed draws in which, for each block by itself."""

def order_visits(
    weights: BlockWeights,
    mass: Doubles | Sequence[float],
    unseen_mass: float,
    samples: int,
    seed: int,
    num_threads: int = 0,
) -> Ids:
    """Systematic weighted sampling, shuffled: block i floor(e_i) or ceil(e_i) times, e_i = samples x its probability.

    `mass` [clusters]: the share of the samples that each gets, up to a factor (0: left out); `unseen_mass`: that of the
    unscored blocks. The mass of an empty cluster is ignored. The visits of a cluster, too, are e rounded down or up.
    `samples` must be below 2^40.
    ValueError where nothing can be drawn.
    """

def order_choice(
    weights: BlockWeights,
    mass: Doubles | Sequence[float],
    unseen_mass: float,
    samples: int,
    seed: int,
    num_threads: int = 0,
) -> Ids:
    """Weighted choice without replacement, shuffled, with the probabilities of `order_visits`.

    Where `samples` exceeds the number of blocks, complete shuffled passes come first; the choice is the last one.
    """

def cluster(scores: Scores, k: int = 8, bins: int = 4096, num_threads: int = 0) -> Doubles:
    """Compute the exact 1-D k-means of the scores, put into `bins` bins of equal width (k to 65536); k at most 63.

    Returns the ascending cuts between clusters [k' - 1]; k' < k where fewer bins are occupied. The number of cuts <= a
    score is its cluster. ValueError where no block has a score.
    """

def percentiles(scores: Scores, q: Sequence[float], num_threads: int = 0) -> Scores:
    """Return the scores at ranks ceil(q * scored), counted from 1, for each q in [0, 1]; up to three in one pass.
    ValueError if no block has a score."""

def interleave(ids: Ids, counts: Sequence[int], seed: int, num_threads: int = 0) -> Ids:
    """Merge sequences of counts[0], counts[1], ... ids, which are stored one after another in `ids`, at random.

    Every merger that keeps the order within each sequence is equally likely. ValueError unless `counts` sum to the
    number of ids.
    """

def draw_distinct(n: int, count: int, seed: int, num_threads: int = 0) -> Ids:
    """Return `count` different ids below n; every sequence of them is equally likely."""

def place_evenly(items: Ids, order: Ids, num_threads: int = 0) -> None:
    """Write items [k] to evenly spaced positions of `order` [n >= k], of the same type: item i to floor(i n / k)."""

def count_parts(ids: Ids, sizes: Sequence[int], num_threads: int = 0) -> npt.NDArray[np.uint64]:
    """Count the ids in each of the parts of sizes[0], sizes[1], ... into which 0 ... sum(sizes) - 1 is divided.

    ValueError for an id outside of them.
    """

def order_hash(ids: Ids, num_threads: int = 0) -> int:
    """Return a 64-bit hash of a sequence of ids, which depends on their order, but not on their type."""

SIGNATURE_BINS: int
"""Bins of a min-hash signature."""
NEAR_COPY_BYTES: int
"""Bytes of memory an item that `near_copies` takes."""

def largest_token(
    file: TokenFile,
    dtype_code: int,
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    num_threads: int = 0,
) -> int:
    """Return the largest token of the spans [starts[i], starts[i] + lengths[i]) of a file; 0 where they hold none.

    dtype_code: the file's, as in `IndexFile`. ValueError for a negative token, or one beyond 2^32 - 1.
    """

def sketch_spans(
    file: TokenFile,
    dtype_code: int,
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    shingle: int,
    hashes: npt.NDArray[np.uint64],
    signatures: npt.NDArray[np.uint16],
    num_threads: int = 0,
) -> None:
    """Write a hash of the tokens of each span into `hashes` [n], and its signature into `signatures` [n, bins].

    The share of bins in which two signatures agree estimates the Jaccard similarity of the sets of runs of `shingle`
    tokens (a shorter span has one of all its tokens): fast similarity sketching (Dahlgaard, Knudsen & Thorup 2017).
    """

def exact_copies(
    hashes: npt.NDArray[np.uint64], num_threads: int = 0
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Return (the lowest id with the same hash, how many have it) of each item [n]."""

def near_copies(
    signatures: str, representative: npt.NDArray[np.uint32], threshold: float, num_threads: int = 0
) -> npt.NDArray[np.uint32]:
    """Return the lowest id of each item's cluster of near copies [n].

    signatures: a file of them, u16 [n, bins]. representative: of `exact_copies`. A cluster is a connected component of
    pairs that agree in all 4 bins of one of 32 bands and in `threshold` (0 to 1] of all bins. Of a band's bucket, each
    item is compared with at most 32 that do not resemble each other.
    """

class NgramModel:
    """A hashed 4-gram model with 2^log2_slots (at most 2^31) counters of 4 bytes, and one for each unigram.

    With h the last n - 1 tokens and h' the last n - 2, P_n(w | h) = (c(h w) + a_n P_{n-1}(w | h')) / (c(h) + a_n),
    where a count of h w is taken as no more than that of h, P_0 = 1 / vocab_size, a_1 = vocab_size / 10, and a_2, a_3,
    a_4 = 100, 20, 10 (MacKay & Peto 1995). No n-gram crosses the beginning of a span. Spans: as in `largest_token`,
    of 2^18 tokens at most.
    """

    def __init__(self, log2_slots: int, vocab_size: int) -> None: ...
    @property
    def tokens(self) -> int:
        """How many were counted."""
    def count(
        self,
        file: TokenFile,
        dtype_code: int,
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        num_threads: int = 0,
    ) -> None:
        """Count the n-grams of the spans. ValueError for a token outside of the vocabulary."""
    def score(
        self,
        file: TokenFile,
        dtype_code: int,
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        leave_out: bool,
        num_threads: int = 0,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(ln P_4, ln P_1) of every token of the spans, one span after another.

        leave_out: by the counts of all other spans; each must have been counted as it is given here.
        """
