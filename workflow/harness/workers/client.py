"""Runs `python -m harness <stage> ...` in a warm worker where there is one to be had, else here.

Started as `python -I -S client.py -m harness <stage> ...`, once a job, with the standard library alone: it takes a
fiftieth of a second. To whoever started it, it is the job: signals reach the worker through it, it ends as the worker
ends, and the worker ends with it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from types import FrameType

WORKERS = "GRASS_WORKERS"
"""Environment variable of a study's jobs: folder of the servers' sockets, which have the names of stages."""
ENDING = (signal.SIGINT, signal.SIGTERM)
"""Signals that a job hears; all others end this process, and the worker with it."""
LENGTH, STATUS = struct.Struct("!Q"), struct.Struct("!i")


def main(arguments: list[str]) -> None:
    """Run `python <arguments>` in a worker, or replace this process by a new one that does the same."""
    folder = os.environ.get(WORKERS)
    if folder is not None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
                server.connect(os.path.join(folder, arguments[2]))
                _ask(server, arguments)
        except OSError:  # it is gone, or was never there
            pass
    os.execv(sys.executable, [sys.executable, *arguments])


def _ask(server: socket.socket, arguments: list[str]) -> None:
    """End as the worker ends; return where there is none, or its server died and took it along."""
    usual = {number: signal.getsignal(number) for number in (*ENDING, signal.SIGTSTP, signal.SIGCONT)}
    umask = os.umask(0)
    os.umask(umask)
    asked = {
        "arguments": arguments,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "umask": umask,
        "ignored": [number for number in ENDING if usual[number] == signal.SIG_IGN],
    }
    text = json.dumps(asked).encode()
    socket.send_fds(server, [LENGTH.pack(len(text))], [0, 1, 2])
    server.sendall(text)
    # until a worker has begun, a signal does what it does to any process
    if server.recv(1) != b"+":
        return
    told: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if number in ENDING:
            told.append(number)
        server.send(bytes([signal.SIGSTOP if number == signal.SIGTSTP else number]))
        if number == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)

    for number in usual:
        signal.signal(number, forward)
    status = b""
    while len(status) < STATUS.size and (more := server.recv(STATUS.size - len(status))):
        status += more
    if len(status) == STATUS.size:
        _end_as(*STATUS.unpack(status))
    if told:
        sys.exit(128 + told[0])
    for number, before in usual.items():
        signal.signal(number, before)


def _end_as(code: int) -> None:
    """End with an exit code, or by the signal whose negative it is."""
    if code >= 0:
        sys.exit(code)
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


if __name__ == "__main__":
    main(sys.argv[1:])
