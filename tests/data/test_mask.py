"""Loss masks: their file, the blocks that they leave, and what must not be mixed up."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.corpus.indexed import IndexedDataset
from megatron_lfr.data.corpus.loader import Loader
from megatron_lfr.data.preprocess.merge import MergeConfig, merge
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from support.indexed_samples import WriteCorpus, write_mask_by_hand

SEQ = 4
DOCUMENTS = [[1, 2, 3, 4, 5], [6, 7], [], [8] * 9, [1, 2, 3], [4] * 5]
MASKS = [[0, 0, 0, 1, 1], [1, 1], [], [0] * 8 + [1], [0, 1, 0], [1] * 5]
FLAT = [token for document in DOCUMENTS for token in document]
MASK = [counts for mask in MASKS for counts in mask]


@pytest.fixture
def prefix(write_corpus: WriteCorpus) -> Path:
    """Return a corpus with a mask, both laid out by hand."""
    path = write_corpus("c", DOCUMENTS)
    write_mask_by_hand(path, MASK)
    return path


def blocks_with_loss() -> list[int]:
    """Return the first token of each block with a label that counts."""
    return [s for s in range(0, len(FLAT) - SEQ, SEQ) if any(MASK[s + 1 : s + SEQ + 1])]


def test_blocks_are_those_with_loss(prefix: Path, write_corpus: WriteCorpus) -> None:
    plain = write_corpus("plain", [[9] * 10])
    source = BlockDataset([plain, prefix], SEQ, "1").train
    starts = blocks_with_loss()
    assert len(starts) == 4 < (len(FLAT) - 1) // SEQ
    assert source.domain_starts.tolist() == [0, 2, 6]
    assert source.left_out == [0, 1]
    ids = [5, 0, -1, 2, 3, 4]
    rows, mask = source.read(ids), source.read_loss_mask(ids)
    assert mask is not None
    for row, counts, block in zip(rows.tolist(), mask.tolist(), ids, strict=True):
        if block < 2:
            assert row == [9 * (block == 0)] * (SEQ + 1)
            assert counts == [block == 0] * SEQ
            continue
        start = starts[block - 2]
        assert row == FLAT[start : start + SEQ + 1]
        assert counts == [entry == 1 for entry in MASK[start + 1 : start + SEQ + 1]]
    assert source.token_starts(1).tolist() == starts
    ends = np.cumsum([len(document) for document in DOCUMENTS])
    for block, start in enumerate(starts, 2):
        touched = {int(np.searchsorted(ends, at, side="right")) for at in range(start, start + SEQ + 1)}
        assert source.documents_of(block) == sorted(touched)


def test_each_split_has_its_own_blocks(prefix: Path) -> None:
    """Of six documents, the last three are held out: tokens 7 to 23. Labels 8 to 11 do not count."""
    dataset = BlockDataset([prefix], SEQ, "50,50,0")
    assert dataset.train.num_blocks == 1
    assert (dataset.valid.num_blocks, dataset.valid.left_out) == (3, [1])
    assert dataset.valid.read([0])[0].tolist() == FLAT[11:16]


def test_the_mask_is_read_in_parts(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lfr.data.corpus.blocks._MASK_TOKENS", 2 * SEQ)
    assert BlockDataset([prefix], SEQ, "1").train.token_starts(0).tolist() == blocks_with_loss()


def test_the_loader_masks_by_label(prefix: Path) -> None:
    source = BlockDataset([prefix], SEQ, "1").train
    batch = Loader(source, eod=5, eod_mask_loss=True).load(7, [1, -1, 0, 3])
    expected = []
    for block in (1, None, 0, 3):
        start = None if block is None else blocks_with_loss()[block]
        expected.append(
            [0.0] * SEQ
            if start is None
            else [float(MASK[at + 1] and FLAT[at] != 5) for at in range(start, start + SEQ)]
        )
    assert batch.loss_mask.tolist() == expected
    assert batch.valid_tokens == sum(map(sum, expected))


def test_the_writer_writes_what_the_format_says(tmp_path: Path, prefix: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "w", np.uint16, masked=True) as writer:
        for document, mask in zip(DOCUMENTS[:3], MASKS[:3], strict=True):
            writer.add_document(np.array(document, np.uint16), np.array(mask, np.bool_))
        tokens = np.array([token for document in DOCUMENTS[3:] for token in document], np.uint16)
        writer.add_documents(tokens, np.array([9, 3, 5]), np.array([*MASKS[3], *MASKS[4], *MASKS[5]]))
    for suffix in (".idx", ".bin", ".mask"):
        assert (tmp_path / f"w{suffix}").read_bytes() == prefix.with_name(f"c{suffix}").read_bytes()
    dataset = IndexedDataset(tmp_path / "w")
    assert [dataset.mask_of(i).tolist() for i in range(6)] == MASKS  # type: ignore[union-attr]


def test_what_a_writer_refuses(tmp_path: Path, prefix: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "masked", np.uint16, masked=True) as writer:
        writer.add_document(np.array([1, 2]))
        with pytest.raises(ValueError, match=r"a mask of shape \[1\] for 2 tokens"):
            writer.add_document(np.array([1, 2]), np.array([1]))
    assert IndexedDataset(tmp_path / "masked").mask_of(0).tolist() == [1, 1]  # type: ignore[union-attr]
    with IndexedDatasetWriter(tmp_path / "plain", np.uint16) as writer:
        with pytest.raises(ValueError, match="is written without a loss mask"):
            writer.add_document(np.array([1, 2]), np.array([1, 1]))
        with pytest.raises(ValueError, match=r"has a loss mask, but .*plain is written without one"):
            writer.add_dataset(IndexedDataset(prefix))
        writer.add_document(np.array([1]))
    assert IndexedDataset(tmp_path / "plain").mask is None


def replaced(at: int, form: str, *values: object) -> Callable[[bytes], bytes]:
    data = struct.pack(form, *values)
    return lambda content: content[:at] + data + content[at + len(data) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "too short for the header of a loss mask"),
        (lambda content: content[:55], "too short for the header of a loss mask"),
        (replaced(0, "8s", b"MMIDIDX\0"), r"not a loss mask \(wrong magic\)"),
        (replaced(8, "<Q", 2), "version 2, only 1 is known"),
        (lambda content: content[:-1], "truncated: holds 23 entries, its header says 24"),
        (lambda content: content + b"\1", "longer than it should be: holds 25 entries, its header says 24"),
        (replaced(16, "<Q", 1 << 62), "truncated: holds 24 entries"),
        (lambda content: replaced(16, "<Q", 23)(content)[:-1], "is the mask of another .bin and .idx"),
        (replaced(24, "32s", bytes(32)), "is the mask of another .bin and .idx"),
        (replaced(60, "B", 2), "holds 2, where only 0 and 1 are legal"),
    ],
)
def test_damage_is_named(prefix: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = prefix.with_name("c.mask")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"c\.mask: .*{message}"):
        BlockDataset([prefix], SEQ, "1")


def test_a_mask_of_other_tokens_is_refused(prefix: Path, write_corpus: WriteCorpus) -> None:
    """Of another corpus of the same lengths, and of the same one with one token changed."""
    other = write_corpus("other", [[token % 7 for token in document] for document in DOCUMENTS])
    shutil.copyfile(prefix.with_name("c.mask"), other.with_name("other.mask"))
    with pytest.raises(ValueError, match=r"other\.mask: is the mask of another .bin and .idx \(of 24 tokens\)"):
        IndexedDataset(other)
    data = bytearray(prefix.with_name("c.bin").read_bytes())
    data[4] += 1
    prefix.with_name("c.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"c\.mask: is the mask of another"):
        IndexedDataset(prefix)


def test_a_mask_that_is_no_file(prefix: Path) -> None:
    path = prefix.with_name("c.mask")
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"c\.mask: is not a regular file"):
        IndexedDataset(prefix)


def test_a_missing_mask_is_named(prefix: Path, with_sidecar: WriteCorpus) -> None:
    with_sidecar(prefix, format=2, mask=True)
    assert BlockDataset([prefix], SEQ, "1").train.num_blocks == 4
    prefix.with_name("c.mask").unlink()
    with pytest.raises(ValueError, match=r"c\.mask: no such file, but c\.meta says that the corpus has a loss mask"):
        BlockDataset([prefix], SEQ, "1")
    with pytest.raises(ValueError, match=r"c\.mask: no such file"):
        merge(MergeConfig([prefix], prefix.with_name("merged")))
    with_sidecar(prefix)
    write_mask_by_hand(prefix, MASK)
    with pytest.raises(ValueError, match=r"c\.mask: c\.meta says that the corpus has no loss mask"):
        BlockDataset([prefix], SEQ, "1")


def test_a_mask_that_leaves_nothing(prefix: Path) -> None:
    write_mask_by_hand(prefix, [0] * 24)
    with pytest.raises(ValueError, match=r"--data-path .*c: its loss mask leaves no token to train on"):
        BlockDataset([prefix], SEQ, "1")


def test_another_mask_is_another_corpus(prefix: Path) -> None:
    """Also where a single entry differs, and where there is none."""
    masked = BlockDataset([prefix], SEQ, "1").digests()
    assert BlockDataset([prefix], SEQ, "1").digests() == masked
    write_mask_by_hand(prefix, [*MASK[:10], 1, *MASK[11:]])
    other = BlockDataset([prefix], SEQ, "1").digests()
    prefix.with_name("c.mask").unlink()
    assert len({*masked, *other, *BlockDataset([prefix], SEQ, "1").digests()}) == 3


def test_merged_masks(prefix: Path, write_corpus: WriteCorpus, with_sidecar: WriteCorpus) -> None:
    """All tokens of a corpus without a mask count."""
    plain, merged = write_corpus("plain", [[1, 2], [3]]), prefix.with_name("merged")
    with_sidecar(prefix, format=2, mask=True)
    with_sidecar(plain)
    merge(MergeConfig([plain, prefix], merged))
    assert merged.with_name("merged.mask").read_bytes()[56:] == bytes([1, 1, 1, *MASK])
    dataset = BlockDataset([merged], 2, "1")
    assert dataset.datasets[0].mask is not None
    assert '"format": 2' in merged.with_name("merged.meta").read_text()
    merge(MergeConfig([plain], merged, overwrite=True))
    assert not merged.with_name("merged.mask").exists()
    assert BlockDataset([merged], 2, "1").datasets[0].mask is None
