"""The scripts for Slurm on a stub of it, and the manifest for Kubernetes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import parity_matrix as matrix
import pytest
import yaml
from torch.distributed.run import get_args_parser

from support.same_run import assert_same_bits
from support.slurm import Slurm
from support.two_ranks import train_two_ranks
from support.waiting import wait_until

EXAMPLES = Path(__file__).parents[1] / "examples"
TWO_NODES = {"nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "1", "cpus-per-task": "1"}


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return matrix.write_corpus(tmp_path_factory.mktemp("corpus"))


def flags(prefixes: list[str], folder: Path) -> list[str]:
    return [
        *matrix.run_flags(prefixes, folder),
        "--lfr-schedule",
        "lfr",
        "--train-epochs",
        "6",
        "--save-interval",
        "1000",
    ]


@pytest.fixture(scope="module")
def reference(prefixes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    train_two_ranks(flags(prefixes, folder), folder.with_name("said"), machines=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["srun", "torchrun"])
def test_a_job_is_stopped_before_its_limit_and_comes_back(
    name: str, prefixes: list[str], tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH_DIR", str(tmp_path / "scratch"))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("CONTAINER_IMAGE", "/images/one.sqsh")
    (tmp_path / "scratch").mkdir()
    folder, slurm = tmp_path / "run", Slurm(tmp_path / "slurm")
    metrics = folder / "metrics.jsonl"

    def before_limit() -> bool:
        return wait_until(lambda: metrics.exists() and metrics.stat().st_size > 600)

    code, out, starts = slurm.sbatch(
        EXAMPLES / "slurm" / f"{name}.sbatch", TWO_NODES, flags(prefixes, folder), before_limit
    )
    assert (code, starts) == (0, 2), out
    assert out.count("to be continued") == 1
    assert len(re.findall(r"^(SIGUSR1|another rank was asked to stop): saving at step", out, re.MULTILINE)) == 1, out
    assert "continuing" in out
    assert_same_bits(folder, reference)
    first, cleaning, *again = slurm.commands()
    assert first[2:4] == ["--container-image=/images/one.sqsh", f"--container-mounts={tmp_path / 'slurm'},/tmp"]
    assert cleaning[-3:-1] == ["rm", "-rf"]
    assert again == [first if name == "srun" else again[0], cleaning]
    assert not list((tmp_path / "scratch").iterdir())


def test_a_job_that_fails_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    slurm = Slurm(tmp_path / "slurm")
    code, out, starts = slurm.sbatch(EXAMPLES / "slurm" / "srun.sbatch", TWO_NODES, ["--no-such-flag"], lambda: False)
    assert (code, starts) == (2, 1), out
    assert "--no-such-flag" in out


def test_the_manifest_for_kubernetes() -> None:
    manifest = yaml.safe_load((EXAMPLES / "kubernetes" / "pytorchjob.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
    replicas: dict[str, Any] = manifest["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master", "Worker"]
    assert replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert replica["replicas"] >= 1
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == manifest["spec"]["nprocPerNode"]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert all(isinstance(value, str) for value in environment.values())
        assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["command"] == ["python", "-m", "torch.distributed.run"]
        arguments = get_args_parser().parse_args(container["args"])
        assert (arguments.module, arguments.training_script) == (True, "megatron_lfr")
        assert arguments.training_script_args[0] == "train"
        assert {word.partition("=")[0] for word in arguments.training_script_args[1:]} == {
            *("--config", "--save", "--lfr-scratch-dir"),
        }
