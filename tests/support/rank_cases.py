"""What two ranks run on one store: each case returns what a rank found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.config.training import TrainingConfig
from megatron_lfr.training.stopping import StoppedError, Stopping
from support.checkpoint_samples import no_file_above
from support.waiting import LIMIT

RANKS = 2


def full_tensors() -> dict[str, Tensor]:
    """Return what the checkpoint says, whoever saves or loads it."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(5, 4, generator=generator)  # five rows: three on rank 0, two on rank 1
    return {
        "rows": weight,
        "rows.tied": weight,
        "columns": torch.randn(3, 4, generator=generator),
        "one row": torch.randn(1, 3, generator=generator),  # rank 1 holds none of it
        "half": torch.randn(4, generator=generator).to(torch.bfloat16),
        "replicated": torch.arange(6),
        "step": torch.tensor(7.0),
        "plain": torch.randn(2, 2, generator=generator),
        "plain step": torch.tensor(8),
        "stage.0": torch.full((2,), 0.5),
        "stage.1": torch.full((3,), 1.5),
    }


def on_this_rank(tensors: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """Return the part of `tensors` that a rank holds: shards, replicas, plain copies, and one stage of a pipeline."""
    placements = {
        **dict.fromkeys(("rows", "rows.tied", "one row", "half"), Shard(0)),
        "columns": Shard(1),
        **dict.fromkeys(("replicated", "step"), Replicate()),
    }
    held: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in placements:
            held[name] = distribute_tensor(tensor, mesh, [placements[name]])
        elif not name.startswith("stage.") or name == f"stage.{dist.get_rank()}":
            held[name] = tensor
    held["rows.tied"] = held["rows"] if tensors["rows"] is tensors["rows.tied"] else held["rows.tied"]
    return held


def equal_to_full(held: dict[str, Tensor]) -> bool:
    full = full_tensors()
    return all(
        torch.equal(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, full[name])
        for name, tensor in held.items()
    )


def zeros(mesh: DeviceMesh) -> dict[str, Tensor]:
    return on_this_rank({name: torch.zeros_like(tensor) for name, tensor in full_tensors().items()}, mesh)


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def save_and_load(root: Path, mesh: DeviceMesh) -> dict[str, object]:
    store = CheckpointStore(root, keep=None)
    store.save(3, on_this_rank(full_tensors(), mesh), {"by": dist.get_rank()})
    newest = store.newest_complete()
    assert newest is not None
    target = zeros(mesh)
    newest.load_into(target)
    return {"iteration": newest.iteration, "state": newest.state, "equal": equal_to_full(target)}


def load_what_one_rank_saved(root: Path, mesh: DeviceMesh) -> dict[str, object]:
    newest = CheckpointStore(root, keep=None).newest_complete()
    assert newest is not None
    target = zeros(mesh)
    newest.load_into(target)
    return {"equal": equal_to_full(target)}


def errors_on_one_rank(root: Path, mesh: DeviceMesh) -> dict[str, object]:
    """Each of these fails on one rank only; the other must not wait for it."""
    store = CheckpointStore(root, keep=None)
    rank = dist.get_rank()
    tensors = on_this_rank(full_tensors(), mesh)
    store.save(1, tensors, {})
    results: dict[str, object] = {
        "state": error_of(lambda: store.save(2, tensors, {"x": float("nan")} if rank == 0 else {})),
        "tensor": error_of(lambda: store.save(2, tensors | ({"x": 3} if rank == 1 else {}), {})),  # type: ignore[arg-type]
    }
    with no_file_above(100_000) if rank == 1 else nullcontext():
        results["disk"] = error_of(lambda: store.save(2, {f"big.{rank}": torch.zeros(50_000)}, {}))
    newest = store.newest_complete()
    assert newest is not None
    results["newest"] = newest.iteration
    other = zeros(mesh) | ({"replicated": torch.zeros(2)} if rank == 1 else {})
    results["shape"] = error_of(lambda: newest.load_into(other))
    return results


def damage(root: Path, mesh: DeviceMesh) -> dict[str, object]:
    store = CheckpointStore(root, keep=None)
    for iteration in (1, 2, 3):
        store.save(iteration, on_this_rank(full_tensors(), mesh), {})
    if dist.get_rank() == 0:
        for iteration, shard in ((2, "shard-00001"), (3, "shard-00002")):
            (path,) = (root / f"iter_{iteration:07d}").glob(f"{shard}-*")
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
    dist.barrier()
    newest = store.newest_complete()
    assert newest is not None
    return {"iteration": newest.iteration}


def stop_on_one_rank(root: Path, mesh: DeviceMesh) -> dict[str, object]:
    """Signal to rank 1 between two batches of an evaluation: both leave it together."""
    stopping, looks = Stopping(TrainingConfig(), dist.group.WORLD), 0
    with stopping.watching(), suppress(StoppedError):
        for batch in range(5):
            if batch == 2 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            stopping.look()
            looks += 1
    return {"reason": stopping.reason, "looks": looks}


def disks_of_their_own(root: Path, mesh: DeviceMesh) -> dict[str, object]:
    """Ranks of hosts that share no file system: the same path is another folder on each."""
    rank, before = dist.get_rank(), Path.cwd()
    disk = root / f"disk{rank}"
    disk.mkdir(parents=True)
    os.chdir(disk)
    with mock.patch.object(socket, "gethostname", return_value=f"host{rank}"):
        store = CheckpointStore(Path("run"), keep=None)
        folder = store.save(1, on_this_rank(full_tensors(), mesh), {})
        results: dict[str, object] = {"saved": all_names(Path("run"))}
        newest = store.newest_complete()
        assert newest is not None
        target = zeros(mesh)
        newest.load_into(target)
        results |= {"equal": equal_to_full(target), "loaded": all_names(Path("run"))}
        with no_file_above(10_000) if rank == 0 else nullcontext():  # rank 1's file does not fit on the disk of rank 0
            results["full"] = error_of(lambda: store.save(2, {f"big.{rank}": torch.zeros(10 + 50_000 * rank)}, {}))
        results["after"] = all_names(Path("run"))
        if rank == 1:
            (folder / "manifest.json").write_text("{}")
        results["other"] = error_of(store.newest_complete)
        if rank == 1:
            shutil.rmtree(folder)
        results["again"] = error_of(store.newest_complete)
    os.chdir(before)
    return results


def all_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


Case = Callable[[Path, DeviceMesh], dict[str, object]]
CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        *(save_and_load, load_what_one_rank_saved, errors_on_one_rank, damage, stop_on_one_rank),
        disks_of_their_own,
    )
}


def main(rank: int, folder: str, cases: Mapping[str, Case] = CASES) -> None:
    rendezvous = f"file://{Path(folder, 'rendezvous')}"
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=RANKS, timeout=timedelta(seconds=LIMIT)
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    results = {name: case(Path(folder, name), mesh) for name, case in cases.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
