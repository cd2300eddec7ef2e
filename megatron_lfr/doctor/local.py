"""What a rank can say of itself, before it meets any other: versions, device, interfaces, the launcher's variables."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import socket
import struct
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import megatron_lfr

_PACKAGES = ("torch", "numpy", "triton", "safetensors", "tokenizers", "deepspeed")
_GET_ADDRESS = 0x8915
"""SIOCGIFADDR of Linux."""
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
_SHOWN = (*INTERFACE_VARIABLES, "NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_DEBUG", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class RankFacts:
    """One rank, as plain values that travel to the others."""

    host: str
    versions: dict[str, str]
    """Name → version; a package that is not installed is left out."""
    device: str
    """Name of the device; "cpu" without a GPU."""
    device_id: str
    """What no other device in this machine has; empty without a GPU."""
    interfaces: dict[str, str]
    """Name → IPv4 address, empty where it has none; without loopback."""
    variables: dict[str, str]
    """Environment variables that choose interfaces and threads."""
    name_address: str
    """IPv4 address to which the host's own name leads, empty where it leads nowhere: where gloo listens unless a
    variable names an interface."""
    wrong_interfaces: list[str]
    """Sentences on variables that name no interface of this machine."""


def rank_facts(device: torch.device) -> RankFacts:
    """Find out what can be known of this rank alone. device: the one that it computes on."""
    interfaces = visible_interfaces()
    variables = {name: os.environ[name] for name in _SHOWN if name in os.environ}
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return RankFacts(
        socket.gethostname(),
        _versions(),
        "cpu" if properties is None else f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
        "" if properties is None else str(properties.uuid),
        {name: address for name, address in interfaces.items() if not address.startswith("127.")},
        variables,
        _name_address(),
        _wrong_interfaces(variables, interfaces),
    )


def meeting_problems(facts: RankFacts) -> list[str]:
    """Return what keeps a rank from meeting ranks of other machines, as sentences."""
    if "GLOO_SOCKET_IFNAME" in facts.variables or facts.wrong_interfaces:
        return facts.wrong_interfaces
    if not facts.name_address:
        return [f"the name {facts.host} has no address: gloo listens there unless GLOO_SOCKET_IFNAME is set"]
    if facts.name_address.startswith("127."):
        return [
            f"the name {facts.host} leads to {facts.name_address}, which other machines cannot reach: gloo listens "
            f"there unless GLOO_SOCKET_IFNAME is set; interfaces here: {', '.join(facts.interfaces)}"
        ]
    return []


def visible_interfaces() -> dict[str, str]:
    """Return the network interfaces of this process, loopback included, as name → IPv4 address (empty without one)."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
                addresses[name] = socket.inet_ntoa(answer[20:24])
            except OSError:  # it has no IPv4 address
                addresses[name] = ""
    return addresses


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version(), "megatron-lfr": megatron_lfr.__version__, "its code": _code()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        versions["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return versions


def _code() -> str:
    """Return a short hash of this package's code, which tells checkouts of one version apart."""
    folder = Path(megatron_lfr.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".so")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _wrong_interfaces(variables: dict[str, str], interfaces: dict[str, str]) -> list[str]:
    """NCCL's names are beginnings of names, `=` in front of its list asks for exact ones, and `^` excludes."""
    problems = []
    for variable in INTERFACE_VARIABLES:
        value = variables.get(variable, "")
        exact = value.startswith("=") or not variable.startswith("NCCL")
        names = [name.partition(":")[0] for name in value.removeprefix("=").split(",") if name]
        is_here = any(i == name if exact else i.startswith(name) for name in names for i in interfaces)
        if names and not is_here and not value.startswith("^"):
            problems.append(f"{variable}={value} names no interface of this machine, which has {', '.join(interfaces)}")
    return problems


def _name_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""
