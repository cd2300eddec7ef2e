"""Attention inside of documents: both backends against fp64, what they are given, and who chooses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lfr.model import Decoder, ModelConfig, attention
from megatron_lfr.model.attention import (
    AttentionBackend,
    attention_mask,
    block_mask,
    block_sparse,
    choose_backend,
    describe,
    dot_product,
    mask_bytes,
)
from support.flex_on_cpu import flex_on_cpu

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    vocab_size=50,
    max_position_embeddings=4096,
    init_method_std=0.2,
)
CHOICE: dict[str, Any] = {
    "on_gpu": True,
    "has_documents": True,
    "has_window": False,
    "context_ranks": 1,
    "is_compiled": False,
    "head_dim": 64,
}
DOCUMENTS: dict[str, list[list[int]]] = {
    "several": [[70, 90, 140], [1, 129, 170], [299, 1, 0]],
    "none crosses a block": [[128, 128, 44], [256, 44], [128, 172]],
    "one each": [[300], [300]],
    "of one token": [[1] * 300],
    "in whole blocks": [[200, 184], [130, 254]],
}


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    """Forget what a test has compiled: of one function, PyTorch compiles only so many kinds in a process."""
    yield
    torch._dynamo.reset()


def ids_of(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


def chunks_of(rank: int, ranks: int, length: int) -> Tensor:
    """Positions of a context-parallel rank's tokens."""
    chunks = torch.arange(length).chunk(2 * ranks)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))


def exact(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, rows: Tensor, window: int | None = None) -> Tensor:
    """Compute a softmax over what each query sees, in fp64."""
    heads = q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(heads, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) / q.shape[-1] ** 0.5
    for batch in range(len(q)):
        for number, position in enumerate(rows.tolist()):
            hidden = torch.arange(k.shape[1]) > position
            if window is not None:
                hidden |= torch.arange(k.shape[1]) <= position - window
            if ids is not None:
                hidden |= ids[batch] != ids[batch, position]
            scores[batch, :, number, hidden] = -torch.inf
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def make_inputs(ids: Tensor, queries: int, heads: int = 4, groups: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values, and the gradient of what attention returns."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((queries, heads), (ids.shape[1], groups), (ids.shape[1], groups), (queries, heads))
    q, k, v, gradient = (torch.randn(len(ids), n, h, 16, generator=generator) for n, h in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), gradient


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    if isinstance(mask, BlockMask):
        return block_sparse(q, k, v, mask)
    return dot_product(q, k, v, mask, is_causal=False)


def assert_equal_to_fp64(
    backend: AttentionBackend, ids: Tensor, rows: Tensor, heads: int, groups: int, window: int | None = None
) -> None:
    q, k, v, gradient = make_inputs(ids, len(rows), heads, groups)
    mixed = attend(q, k, v, attention_mask(backend, rows, ids.shape[1], ids, window, q.dtype))
    expected = exact(q, k, v, ids, rows, window)
    gradients = torch.autograd.grad(mixed, (q, k, v), gradient)
    torch.testing.assert_close(mixed, expected.float(), atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, torch.autograd.grad(expected, (q, k, v), gradient.double()), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_documents_of_all_kinds(documents: str, backend: AttentionBackend) -> None:
    ids = ids_of(DOCUMENTS[documents])
    with flex_on_cpu():
        assert_equal_to_fp64(backend, ids, torch.arange(ids.shape[1]), 4, 2)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("groups", [4, 1])
def test_one_key_a_query_and_one_key_for_all(groups: int, backend: AttentionBackend) -> None:
    with flex_on_cpu():
        assert_equal_to_fp64(backend, ids_of([[100, 60]]), torch.arange(160), 4, groups)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_tokens_of_a_context_parallel_rank(rank: int, backend: AttentionBackend) -> None:
    with flex_on_cpu():
        assert_equal_to_fp64(backend, ids_of([[300, 84], [3, 381]]), chunks_of(rank, 2, 384), 4, 2)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("window", [1, 5, 128, 200])
def test_a_window_of_earlier_tokens(window: int, backend: AttentionBackend) -> None:
    with flex_on_cpu():
        assert_equal_to_fp64(backend, ids_of([[300, 84], [3, 381]]), chunks_of(0, 2, 384), 4, 2, window)
        q, k, v, _ = make_inputs(ids_of([[384]]), 384)
        rows = torch.arange(384)
        mixed = attend(q, k, v, attention_mask(backend, rows, 384, None, window, q.dtype))
        torch.testing.assert_close(mixed, exact(q, k, v, None, rows, window).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler for torch.compile")
@torch.no_grad()
def test_the_compiled_kernel_skips_blocks_and_serves_every_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile's own kernel for a CPU, which has a forward pass alone."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    rows = torch.arange(300)
    batches = [ids_of([[70, 90, 140], [128, 172]]), ids_of([[300], [1, 299]])]
    q, k, v, _ = (tensor.detach() for tensor in make_inputs(batches[0], 300))
    for number, ids in enumerate(batches):
        mask = block_mask(rows, 300, ids)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            result = block_sparse(q, k, v, mask)
        torch.testing.assert_close(result, exact(q, k, v, ids, rows).float(), atol=1e-5, rtol=1e-5)
        # It asks no block that is not listed: without all of a row's blocks but one, the others are not seen.
        if number:
            mask.full_kv_num_blocks.zero_()  # type: ignore[union-attr]
            with torch.compiler.set_stance("fail_on_recompile"):
                assert (block_sparse(q, k, v, mask) - result).abs().max() > 1e-2


def listed(counts: Tensor | None, indices: Tensor | None) -> list[list[list[int]]]:
    """Blocks by sequence and row."""
    assert counts is not None
    assert indices is not None
    return [
        [sorted(indices[b, 0, row, :count].tolist()) for row, count in enumerate(counts[b, 0].tolist())]
        for b in range(len(counts))
    ]


@pytest.mark.parametrize("window", [100, 129, 500])
def test_blocks_of_a_window_are_those_of_all_pairs(window: int) -> None:
    mask = block_mask(torch.arange(1000), 1000, None, window)
    expected = create_block_mask(mask.mask_mod, None, None, 1000, 1000, "cpu")
    for kind in ("kv", "full_kv"):
        one, other = (listed(getattr(m, f"{kind}_num_blocks"), getattr(m, f"{kind}_indices")) for m in (mask, expected))
        assert one == other


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_blocks_are_those_that_pytorch_finds_from_all_pairs(documents: str, ranks: int) -> None:
    ids = ids_of(DOCUMENTS[documents]).repeat_interleave(4, 1)
    for rank in range(ranks):
        rows = chunks_of(rank, ranks, ids.shape[1])
        mask = block_mask(rows, ids.shape[1], ids)
        expected = create_block_mask(mask.mask_mod, len(ids), None, len(rows), ids.shape[1], "cpu")
        for kind in ("kv", "full_kv", "q", "full_q"):
            one, other = (
                listed(getattr(m, f"{kind}_num_blocks"), getattr(m, f"{kind}_indices")) for m in (mask, expected)
            )
            if ranks == 1 or "full" in kind:
                assert one == other
            else:  # a block at the border of the two chunks: ranges are wider than what is in it
                assert all(set(b) <= set(a) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_ids_in_no_order_lose_no_block() -> None:
    ids = torch.randint(0, 5, (3, 1000), generator=torch.Generator().manual_seed(3))
    ids[1, 300:700] = 2
    mask = block_mask(torch.arange(1000), 1000, ids)
    expected = create_block_mask(mask.mask_mod, 3, None, 1000, 1000, "cpu")
    assert torch.equal(mask.full_kv_num_blocks, expected.full_kv_num_blocks)
    for one, other in (
        (listed(m.kv_num_blocks, m.kv_indices), listed(e.kv_num_blocks, e.kv_indices)) for m, e in ((mask, expected),)
    ):
        assert all(set(b) <= set(a) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(
    ("compiled", "recompute"), [(False, "selective"), (False, "full"), (True, None), (True, "selective")]
)
def test_a_model_computes_the_same_with_both(compiled: bool, recompute: Any) -> None:
    """Eager, compiled in whole layers, and recomputed."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 50, (2, 161), generator=generator)
    ids = ids_of([[100, 60], [17, 143]])
    results = []
    with flex_on_cpu():
        for backend in ("sdpa", "flex"):
            model = Decoder(CONFIG, 1, attention_backend=backend, recompute_granularity=recompute)  # type: ignore[arg-type]
            for layer in model.layers.values():
                if compiled:
                    layer.compile(fullgraph=True, backend="aot_eager")
            loss, *_ = model(tokens[:, :-1], tokens[:, 1:], torch.full((2, 160), 1 / 320), document_ids=ids)
            loss.backward()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            results.append((loss.detach(), gradients))
    (loss, gradients), (other_loss, others) = results
    torch.testing.assert_close(loss, other_loss, atol=1e-6, rtol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], atol=1e-6, rtol=1e-4)


class Sizes(TorchDispatchMode):
    """The most elements of a tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@torch.no_grad()
def test_a_gpu_gets_no_tensor_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without numbers, of which none can be read back either: the host waits for nothing."""
    length, rows, masks = 4096, 2, []

    def compiled(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, enable_gqa: bool) -> Tensor:
        assert (q.shape, k.shape) == ((rows, 4, length, 16), (rows, 2, length, 16))
        assert (q.dtype, k.dtype, v.dtype) == (torch.bfloat16,) * 3
        assert block_mask.shape == (rows, 1, length, length)
        assert enable_gqa
        masks.append(block_mask)
        return torch.empty_like(q)

    monkeypatch.setattr(attention, "_compiled", lambda: compiled)
    largest = {}
    with torch.device("meta"):
        tokens = torch.empty(rows, length, dtype=torch.int64)
        for backend in (choose_backend("auto", **CHOICE), choose_backend("sdpa", **CHOICE)):
            model = Decoder(CONFIG, None, attention_backend=backend, compute_dtype=torch.bfloat16)
            with Sizes() as sizes:
                hidden = model.hidden_states(tokens, document_ids=tokens)
            assert hidden.shape == (rows, length, CONFIG.hidden_size)
            largest[backend] = sizes.largest
    assert largest["flex"] < length**2
    assert largest["sdpa"] >= rows * length**2
    assert masks == [masks[0]] * CONFIG.num_layers  # one for all layers


@torch.no_grad()
def test_the_compiler_is_given_flex_attention() -> None:
    torch._dynamo.reset()
    called: list[str] = []

    def compile_nothing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    ids = ids_of([[100, 60]])
    q, k, v, _ = make_inputs(ids, 160)
    with flex_on_cpu(compile_nothing):
        block_sparse(q, k, v, block_mask(torch.arange(160), 160, ids))
    assert "flex_attention" in called


@pytest.mark.parametrize("context_ranks", [1, 2])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_bytes_of_a_mask(
    backend: AttentionBackend, has_documents: bool, window: int | None, context_ranks: int
) -> None:
    ids = ids_of([[100, 500], [600, 0], [300, 300]])
    rows = chunks_of(0, context_ranks, 600)
    mask = attention_mask(backend, rows, 600, ids if has_documents else None, window, torch.bfloat16)
    bytes_held = 0
    if isinstance(mask, Tensor):
        bytes_held = mask.nbytes
    elif mask is not None:
        parts = [part for part in mask.as_tuple() if isinstance(part, Tensor)]
        parts += [cell.cell_contents for cell in mask.mask_mod.__closure__]  # type: ignore[attr-defined]
        bytes_held = sum(part.nbytes for part in parts if isinstance(part, Tensor))
    assert bytes_held == mask_bytes(backend, 3, 600, context_ranks, has_documents, window is not None, 2)


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "flex"),
        ({"on_gpu": False}, "sdpa"),
        ({"head_dim": 8}, "sdpa"),
        ({"has_documents": False}, "sdpa"),
        ({"has_documents": False, "is_compiled": True}, "sdpa"),
        ({"has_documents": False, "context_ranks": 2}, "sdpa"),
        ({"has_documents": False, "context_ranks": 2, "is_compiled": True}, "flex"),
        ({"context_ranks": 2}, "flex"),
        ({"has_documents": False, "has_window": True}, "flex"),
    ],
)
def test_what_auto_takes(changes: dict[str, Any], chosen: str) -> None:
    assert choose_backend("auto", **CHOICE | changes) == chosen
    assert choose_backend("sdpa", **CHOICE | changes) == "sdpa"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_gpu": False}, "no backward pass on a CPU; choose from auto, sdpa"),
        ({"head_dim": 8}, "needs heads of 16 channels, not 8 .*choose from auto, sdpa"),
        ({"has_documents": False}, "goes with --reset-attention-mask, --context-parallel-size.*Choose from auto"),
    ],
)
def test_flex_is_refused_where_it_cannot_be_had(changes: dict[str, Any], message: str) -> None:
    assert choose_backend("flex", **CHOICE) == "flex"
    with pytest.raises(ValueError, match=f"^--attention-backend flex: .*{message}"):
        choose_backend("flex", **CHOICE | changes)


def test_every_kernel_is_named_with_its_mask() -> None:
    def line(backend: AttentionBackend, **changes: Any) -> str:
        facts: dict[str, Any] = {"rows": 4, "seq_length": 8192, "context_ranks": 1, "has_documents": True}
        return describe(backend, **facts | {"has_window": False, "is_compiled": False, "itemsize": 2} | changes)

    assert "scaled_dot_product_attention, with a dense document mask of 536,870,912 bytes a mi" in line("sdpa")
    assert "flex_attention, with a block mask of " in line("flex")
    assert "causal and without a mask" in line("sdpa", has_documents=False, context_ranks=2)
    assert "dense window mask of 134,217,728 bytes" in line("sdpa", has_documents=False, has_window=True)
    chunk = 8192 // 4
    dense = chunk * chunk + chunk * 4 * chunk  # of rank 0: chunks 0 and 3
    assert f" {dense:,} bytes a layer" in line("sdpa", has_documents=False, context_ranks=2, is_compiled=True)
    assert mask_bytes("flex", 4, 8192, 1, True, False, 2) < 536_870_912 / 100
