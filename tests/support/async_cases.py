"""What two ranks run on asynchronous stores: each case returns what a rank found."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.checkpoint import store as store_module
from megatron_lfr.parallel import ranks
from support.checkpoint_samples import no_file_above
from support.rank_cases import RANKS, Case, equal_to_full, error_of, full_tensors, on_this_rank, zeros
from support.waiting import LIMIT


def training_goes_on(root: Path, mesh: DeviceMesh) -> dict[str, object]:
    """Rank 1's part is held back, so that rank 0's thread waits for it; the other threads talk and change weights."""
    CheckpointStore(root / "synchronous", None).save(3, on_this_rank(full_tensors(), mesh), {"by": dist.get_rank()})
    group = dist.new_group(backend="gloo")
    store = CheckpointStore(root / "asynchronous", None, group, asynchronous=True)
    begun, go_on = threading.Event(), threading.Event()
    write_tensors = store_module.write_tensors

    def held(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> list[str]:
        begun.set()
        assert dist.get_rank() == 0 or go_on.wait(LIMIT)
        return write_tensors(folder, tensors, group)

    tensors = on_this_rank(full_tensors(), mesh)
    with mock.patch.object(store_module, "write_tensors", held):
        store.save(3, tensors, {"by": dist.get_rank()})
        for tensor in tensors.values():
            tensor.zero_()
        assert begun.wait(LIMIT)
        talk = [ranks.gather([turn, dist.get_rank()], over) for turn in range(3) for over in (None, group)]
        before = store.iterations()
        go_on.set()
        store.wait()
    newest = store.newest_complete()
    assert newest is not None
    target = zeros(mesh)
    newest.load_into(target)
    return {"talk": talk, "before": before, "state": newest.state, "equal": equal_to_full(target)}


def one_rank_fails(root: Path, mesh: DeviceMesh) -> dict[str, object]:
    store = CheckpointStore(root, keep=None, asynchronous=True)
    rank = dist.get_rank()
    store.save(1, on_this_rank(full_tensors(), mesh), {})
    store.wait()
    big = {f"big.{rank}": torch.zeros(50_000)}
    with no_file_above(100_000) if rank == 1 else nullcontext():
        store.save(2, big, {})
        results: dict[str, object] = {"wait": error_of(store.wait)}
        store.save(3, big, {})
        results["next save"] = error_of(lambda: store.save(4, big, {}))
    results["left"] = store.iterations()
    newest = store.newest_complete()
    assert newest is not None
    results["newest"] = newest.iteration
    dist.barrier()  # rank 1 has looked before rank 0 saves
    store.save(5, big, {})
    store.wait()
    results["then"] = store.iterations()
    return results


def no_object_over_the_default_group(root: Path, mesh: DeviceMesh) -> dict[str, object]:
    """As with NCCL, of which no CPU has any: a default group that carries nothing between processes. Comes last."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    files = dist.FileStore(f"{root}-rendezvous", RANKS)
    dist.init_process_group("fake", store=files, rank=rank, world_size=RANKS)
    group = dist.new_group(backend="gloo")
    results: dict[str, object] = {}
    for asynchronous in (False, True):
        name = "asynchronous" if asynchronous else "synchronous"
        store = CheckpointStore(root / name, 1, group, asynchronous)
        store.save(1, {f"stage.{rank}": torch.full((3,), 1.0 + rank)}, {})
        store.wait()
        newest = store.newest_complete()
        assert newest is not None
        stage = torch.zeros(3)
        newest.load_into({f"stage.{rank}": stage})  # the other one is known only to the other rank
        results[name] = stage.tolist()
    return results


CASES: dict[str, Case] = {
    case.__name__: case for case in (training_goes_on, one_rank_fails, no_object_over_the_default_group)
}
