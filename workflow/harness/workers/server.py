"""Imports what jobs need once, and forks a worker for each: `python -m harness.workers.server <folder> <stages>`.

A worker is a fork of a process that has imported modules and done nothing else: it has one thread, has drawn no random
number and started no CUDA. It takes over the client's folder, environment, files and signals, and from there on is a
fresh `python -m harness <stage>` that finds its modules imported already. What would not be the same there is refused,
and the client starts a fresh process: other variables in the environment, source files that have changed.

A server serves stages that import alike. It ends when its stdin does, which whoever started it holds open, and its
workers are done. A worker dies with its client and with its server.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import sysconfig
from array import array
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

from harness.records import provenance
from harness.records.code import DATA, code_of
from harness.workers.client import LENGTH, STATUS
from harness.workers.imports import import_for

PATIENCE_S = 10.0
"""For a client to say what it wants; it has it ready."""
OF_THE_SHELL = frozenset({"_", "SHLVL", "PWD", "OLDPWD"})
"""Variables that may differ between two jobs."""
NO_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""While modules are imported: pyarrow's allocator starts none, since a fork would lose it."""
PACKAGES = ("grass", "baselines", "harness")
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _MADV_POPULATE_READ = 1, 22
_PRESENT = 1 << 63
"""Bit of a page's entry in /proc/self/pagemap."""


@dataclass(frozen=True)
class Job:
    """What a client asks for."""

    arguments: list[str]
    folder: str
    environment: dict[str, str]
    umask: int
    ignored: list[int]
    """Signals that the client was born to ignore."""


@dataclass(eq=False)
class Worker:
    """A job at work."""

    process: int
    ended: int
    """Descriptor that can be read when the process has ended."""
    client: socket.socket
    told: bool = True
    """Whether the client is there to be told."""


class Server:
    """Takes jobs from sockets until `owner` is closed.

    Args:
        listening: bound sockets.
        owner: a descriptor that is at its end when no more jobs will come.
        stages: names of the stages whose modules are imported, when the first job comes.
    """

    def __init__(self, listening: list[socket.socket], owner: int, stages: list[str]) -> None:
        self._listening, self._owner, self._stages = listening, owner, stages
        self._selector = selectors.DefaultSelector()
        for door in listening:
            self._selector.register(door, selectors.EVENT_READ, door)
        self._selector.register(owner, selectors.EVENT_READ)
        self._workers: set[Worker] = set()
        self._imported_with: dict[str, str] | None = None
        self._stamps: dict[str, tuple[int, ...]] = {}
        self._touched: list[tuple[int, int]] = []

    def serve(self) -> Job | None:
        """The job, in a worker; None in the server itself, at its end."""
        while self._listening or self._workers:
            for key, _ in self._selector.select():
                # an event may concern what an earlier one of the same moment has ended
                if key.fd == self._owner:
                    self._close()
                elif key.data in self._listening:
                    if job := self._accept(key.data):
                        return job
                elif key.data in self._workers:
                    if key.fd == key.data.ended:
                        self._finish(key.data)
                    else:
                        self._heed(key.data)
        return None

    def _close(self) -> None:
        self._selector.unregister(self._owner)
        while self._listening:
            door = self._listening.pop()
            self._selector.unregister(door)
            door.close()

    def _accept(self, door: socket.socket) -> Job | None:
        """Start a worker for the next client; the job in the worker, None in the server."""
        server, process, files = os.getpid(), None, list[int]()
        client, _ = door.accept()
        client.settimeout(PATIENCE_S)
        with suppress(OSError, ValueError):  # the client died, or there is no memory for one more
            job = _read(client, files)
            process = os.fork() if self._can(job) else None
        if process == 0:
            self._leave(client)
            _touch(self._touched)
            _become(job, files, server)
            return job
        for file in files:
            os.close(file)
        if process is None:
            client.close()
            return None
        with suppress(OSError):
            client.send(b"+")
        worker = Worker(process, os.pidfd_open(process), client)
        self._workers.add(worker)
        self._selector.register(worker.ended, selectors.EVENT_READ, worker)
        self._selector.register(client, selectors.EVENT_READ, worker)
        return None

    def _can(self, job: Job) -> bool:
        """Whether a worker would be what a fresh process is."""
        given = {name: value for name, value in job.environment.items() if name not in OF_THE_SHELL}
        if self._imported_with is None:
            self._imported_with = given
            before = _stamps()
            with suppress(ImportError):  # the job will say which package is missing
                _import(self._stages, job.environment)
                self._stamps, self._touched = before, _touched()
        alone = len(os.listdir("/proc/self/task")) == 1
        return alone and given == self._imported_with and _stamps() == self._stamps

    def _heed(self, worker: Worker) -> None:
        """Pass the client's signals on, or kill the worker of a client that is gone.

        The worker has not been waited for, so its number is still its own.
        """
        try:
            signals = worker.client.recv(64)
        except OSError:
            signals = b""
        for number in signals:
            os.kill(worker.process, number)
        if not signals:
            worker.told = False
            self._selector.unregister(worker.client)
            os.kill(worker.process, signal.SIGKILL)

    def _finish(self, worker: Worker) -> None:
        """Tell the client how its worker ended."""
        self._workers.remove(worker)
        self._selector.unregister(worker.ended)
        os.close(worker.ended)
        _, status = os.waitpid(worker.process, 0)
        if worker.told:
            self._selector.unregister(worker.client)
            with suppress(OSError):  # it was killed meanwhile
                worker.client.send(STATUS.pack(os.waitstatus_to_exitcode(status)))
        worker.client.close()

    def _leave(self, client: socket.socket) -> None:
        """Close, in a worker, what belongs to the server."""
        self._selector.close()
        for door in self._listening:
            door.close()
        client.close()
        for worker in self._workers:
            os.close(worker.ended)
            worker.client.close()


def _read(client: socket.socket, files: list[int]) -> Job:
    """What the client asks for; its stdin, stdout and stderr are added to `files`."""
    text, given, _, _ = socket.recv_fds(client, LENGTH.size, 3)
    files += given
    if len(text) < LENGTH.size:
        raise ConnectionError
    (length,) = LENGTH.unpack(text)
    parts: list[bytes] = []
    while length:
        parts.append(client.recv(min(length, 1 << 20)))
        if not parts[-1]:
            raise ConnectionError
        length -= len(parts[-1])
    return Job(**json.loads(b"".join(parts)))


def _import(stages: list[str], environment: dict[str, str]) -> None:
    """Import what the stages import while they run, as a job with this environment would."""
    os.environ.clear()
    os.environ.update(environment | NO_THREADS)
    own: Any = sys.stderr
    sys.stderr = _WhateverIsStderr(own)  # type: ignore[assignment]
    try:
        names = import_for(stages)
    finally:
        sys.stderr = own
    # reads the sources, for the hash that every record has
    code_of(tuple(name for name in names if name.partition(".")[0] in PACKAGES))
    gc.collect()
    gc.freeze()


class _WhateverIsStderr:
    """For modules that keep stderr when they are imported: a job's own, which is copied to its log, comes later."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own if sys.stderr is self else sys.stderr, name)


def _stamps() -> dict[str, tuple[int, ...]]:
    """Size, time and number of all of our source files, and of the folders where packages are installed."""
    files = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        files += (f for f in Path(spec.origin).parent.rglob("*") if f.suffix in {".py", *DATA})
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        stat = file.stat()
        found[str(file)] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def _touched() -> list[tuple[int, int]]:
    """Address and length of all parts of mapped files, libraries above all, that this process has in its page table."""
    found = []
    with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb") as pagemap:
        for line in maps:
            addresses, _, _, _, inode, *_ = line.split()
            if inode == "0":
                continue
            page, end = (int(address, 16) // PAGESIZE for address in addresses.split("-"))
            pagemap.seek(8 * page)
            entries = array("Q", pagemap.read(8 * (end - page)))
            for present, run in groupby(entries, lambda entry: bool(entry & _PRESENT)):
                pages = len(list(run))
                if present:
                    found.append((page * PAGESIZE, pages * PAGESIZE))
                page += pages
    return found


def _touch(parts: list[tuple[int, int]]) -> None:
    """Put them into a fork's page table, which gets none of them: a process that imports itself has them, and they
    count in its resident set, which runs record.
    """
    for address, length in parts:
        _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_POPULATE_READ)


def _become(job: Job, files: list[int], server: int) -> None:
    """Take over what a process is born with."""
    # a session of its own: the terminal's signals come by way of the client, once
    os.setsid()
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # it died before
        os._exit(1)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in job.ignored:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(job.folder)
    os.umask(job.umask)
    os.environ.clear()
    os.environ.update(job.environment)
    sys.orig_argv = [sys.executable, *job.arguments]
    provenance.process = "worker"


def main(words: list[str]) -> None:
    """Bind a socket for each stage, go on in the background, and serve until stdin ends."""
    folder, *stages = words
    umask = os.umask(0o077)
    Path(folder).mkdir(exist_ok=True)
    listening = [_bound(Path(folder) / stage) for stage in stages]
    os.umask(umask)
    # a child of nobody: Snakemake's own signals go to the processes below it, and reach workers through their clients
    if os.fork():
        os._exit(0)
    os.setsid()
    # a job's stdin takes its place
    owner = os.dup(0)
    job = Server(listening, owner, stages).serve()
    if job is None:
        return
    os.close(owner)
    module, *rest = job.arguments[1:]
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _bound(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    door.bind(str(path))
    door.listen(128)
    return door


if __name__ == "__main__":
    main(sys.argv[1:])
