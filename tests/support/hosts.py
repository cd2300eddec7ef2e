"""Two hosts on one machine: network namespaces with a cable between them, each with its own host name and, where asked
for, its own disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_ETC = Path("/etc/netns")


@dataclass(frozen=True)
class Host:
    """A host. disks: folders that are others here, by their path: what a process of this host sees in their place."""

    name: str
    namespace: str
    address: str
    disks: dict[Path, Path] = field(default_factory=dict)

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command that runs `words` on this host."""
        script = "".join(f"mount --bind '{disk}' '{path}' && " for path, disk in self.disks.items())
        script += f'hostname {self.name} && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", script, "sh", *words]

    def start(self, words: Sequence[str], output: Path, **environment: str) -> subprocess.Popen[str]:
        """Run a command in a session of its own; its output is appended to a file."""
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        with output.open("ab") as file:
            return subprocess.Popen(
                self.command(words),
                env=os.environ | variables,
                stdout=file,
                stderr=file,
                text=True,
                start_new_session=True,
            )

    def cut_off(self) -> None:
        """Take the cable out."""
        _ip(f"-n {self.namespace} link set eth0 down")

    def connect(self) -> None:
        _ip(f"-n {self.namespace} link set eth0 up")


def _ip(arguments: str, *more: str) -> None:
    subprocess.run(["ip", *arguments.split(), *more], check=True, capture_output=True)


def skip_without_namespaces() -> None:
    """Skip the test where this machine or this user cannot have network namespaces."""
    missing = [name for name in ("ip", "unshare", "mount") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not here: {', '.join(missing)} (Debian: iproute2, util-linux, mount)")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    probe = f"lfr-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    if made.returncode != 0:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    mounts = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, text=True)
    if mounts.returncode != 0:
        pytest.skip(f"no namespaces of mounts and names here: {mounts.stderr.strip()}")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Hosts lfr-1 and lfr-2, who know each other by name, and lfr-2 as lfr-new, too. A connection counts as broken
    after seconds without an answer, not after a quarter of an hour. Processes are to have ended before the block."""
    hosts = [Host(f"lfr-{n}", f"lfr-{n}-{os.getpid()}", f"10.77.0.{n}") for n in (1, 2)]
    names = "127.0.0.1 localhost\n10.77.0.1 lfr-1\n10.77.0.2 lfr-2\n10.77.0.2 lfr-new\n"
    try:
        for host in hosts:
            _ip(f"netns add {host.namespace}")
            folder = _ETC / host.namespace  # what `ip netns exec` puts in the place of files in /etc
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(names)
        one, other = (host.namespace for host in hosts)
        _ip(f"link add eth0 netns {one} type veth peer name eth0 netns {other}")
        for host in hosts:
            _ip(f"-n {host.namespace} address add {host.address}/24 dev eth0")
            _ip(f"-n {host.namespace} link set eth0 up")
            _ip(f"-n {host.namespace} link set lo up")
            _ip(f"netns exec {host.namespace} sh -c", "echo 3 > /proc/sys/net/ipv4/tcp_retries2")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)
            shutil.rmtree(_ETC / host.namespace, ignore_errors=True)


def torchrun(hosts: Sequence[Host], index: int, arguments: Sequence[str]) -> list[str]:
    """Return the command of torchrun on one of the hosts, with a rank each."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}", f"--node-rank={index}"),
        *("--nproc-per-node=1", f"--master-addr={hosts[0].name}", "--master-port=29500", "-m", "megatron_lfr"),
        *arguments,
    ]


@contextmanager
def ssh_servers(hosts: Sequence[Host], folder: Path) -> Iterator[Path]:
    """sshd on port 2222 of each host. Gives the configuration with which ssh reaches them as root."""
    key, known = folder / "key", folder / "known_hosts"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    public = key.with_suffix(".pub").read_text()
    known.write_text("".join(f"[{host.name}]:2222 {public}" for host in hosts))
    (folder / "authorized").write_text(public)
    server, client = folder / "sshd_config", folder / "ssh_config"
    server.write_text(
        f"Port 2222\nHostKey {key}\nAuthorizedKeysFile {folder / 'authorized'}\nStrictModes no\nUsePAM no\n"
        "PidFile none\nPermitRootLogin yes\nPasswordAuthentication no\n"
    )
    client.write_text(
        f"Host *\n Port 2222\n User root\n IdentityFile {key}\n IdentitiesOnly yes\n UserKnownHostsFile {known}\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # where it keeps what has no rights
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    running = [host.start([program, "-D", "-e", "-f", str(server)], folder / "sshd") for host in hosts]
    try:
        yield client
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
