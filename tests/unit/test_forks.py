"""Laws of sockets that forked children must not keep open."""

from __future__ import annotations

import os
import socket

from celery_affinity.forks import close_in_children


def test_a_forked_child_does_not_keep_a_connection_open_whose_process_has_gone() -> None:
    """RabbitMQ learns of a killed leader by the end of its sockets: its children have copies."""
    ours, servers = socket.socketpair()
    close_in_children(ours)
    ready, alive = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # lives on until it is told to end, as a pool process does
        os.close(alive[1])
        servers.close()
        os.write(ready[1], b"x")
        os.read(alive[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        ours.close()
        servers.settimeout(5)
        assert servers.recv(1) == b"", "the server sees the end although the child lives"
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.close(alive[1])
        os.waitpid(child, 0)
        servers.close()
