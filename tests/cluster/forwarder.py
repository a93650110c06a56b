"""Hand connections to 127.0.0.1 of this network namespace to an address of another one.

    forwarder.py LISTEN_PORT /proc/PID/ns/net HOST PORT

A socket belongs for ever to the namespace it was made in. So the listener is made first, and only
then the process moves to the other namespace: accept() goes on here while connect() happens over
there. One process, and no address of the cluster ever appears in this namespace. Imports nothing
of the project: it is started as a script of its own and must start fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import threading
from pathlib import Path

CLONE_NEWNET = 0x40000000
CONNECT_TIMEOUT = 5.0
MAX_CONNECTIONS = 1000
_free = threading.BoundedSemaphore(MAX_CONNECTIONS)


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Copy one direction to its end, then close that half only (`kubectl exec -i` needs it)."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with contextlib.suppress(OSError):
            end.shutdown(how)


def _serve(client: socket.socket, target: tuple[str, int]) -> None:
    with client:
        try:
            upstream = socket.create_connection(target, CONNECT_TIMEOUT)
        except OSError as error:
            print(f"cannot reach {target[0]}:{target[1]}: {error}", file=sys.stderr, flush=True)
            return
        upstream.settimeout(None)
        with upstream:
            for end in (client, upstream):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=_pump, args=(upstream, client), daemon=True)
            back.start()
            _pump(client, upstream)
            back.join()


def _handle(client: socket.socket, target: tuple[str, int]) -> None:
    try:
        _serve(client, target)
    finally:
        _free.release()


def main(port: int, namespace: Path, target: tuple[str, int]) -> None:
    """Listen here, connect there, for ever.

    Raises:
        OSError: the port is taken, or the namespace cannot be entered.
    """
    listener = socket.create_server(("127.0.0.1", port), backlog=512)
    libc = ctypes.CDLL(None, use_errno=True)
    with namespace.open() as handle:
        if libc.setns(handle.fileno(), CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(namespace))
    threading.stack_size(256 * 1024)  # setns is per thread; later threads inherit it
    while True:
        _free.acquire()
        client, _ = listener.accept()
        threading.Thread(target=_handle, args=(client, target), daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), (sys.argv[3], int(sys.argv[4])))
