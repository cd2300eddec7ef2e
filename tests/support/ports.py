"""Ports for ranks to meet at."""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _PORTS = 10000, 20000
"""Below those that Linux gives to connections (from 32768): there, any connection may take one that was free."""
_next = itertools.count(os.getpid() * 97)  # other processes begin elsewhere


def free_port() -> int:
    """Return a port that nobody listens on, another one each time."""
    for number in _next:
        port = _FIRST + number % _PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise AssertionError
