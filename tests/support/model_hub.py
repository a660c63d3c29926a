"""A stand-in for the hub's servers, with models: open, gated, with false content, or gone in the middle of a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "a" * 40
LARGE = (".safetensors", ".bin")


@dataclass
class Hub:
    """What is there, and what was asked."""

    files: Mapping[str, Mapping[str, bytes]]
    """Content of every file, by repository and name."""
    gated: frozenset[str] = frozenset()
    false_content: frozenset[str] = frozenset()
    """Repositories whose weights come with other bytes than their records say."""
    cut_after: int | None = None
    """Bytes of weights after which the connection breaks, once."""
    gone_then: bool = False
    """Whether the server is gone for good from that moment on."""
    address: str = ""
    ranges: list[str] = field(default_factory=list)
    """Range headers of the requests for weights, empty where there was none."""
    gone: bool = False


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if hub.gone:
                self.close_connection = True
                self.connection.close()
                return
            path = self.path.partition("?")[0].strip("/").removeprefix("api/models/")
            repo = "/".join(path.split("/")[:2])
            kind, revision, *rest = [*path.split("/")[2:], "", ""]
            if repo not in hub.files:
                self._no(401, "RepoNotFound")  # what a private one says too
            elif revision not in (COMMIT, "main"):
                self._no(404, "RevisionNotFound")
            elif kind == "resolve" and repo in hub.gated:
                self._no(403, "GatedRepo")
            elif kind == "resolve":
                self._file(repo, "/".join(filter(None, rest)))
            elif kind == "tree":
                self._json([_entry(name, data) for name, data in hub.files[repo].items()])
            else:
                self._json({"id": repo, "sha": COMMIT, "siblings": [], "private": False, "tags": []})

        def _file(self, repo: str, name: str) -> None:
            data = hub.files[repo].get(name)
            if data is None:
                self._no(404, "EntryNotFound")
                return
            large = name.endswith(LARGE)
            etag = hashlib.sha256(data).hexdigest() if large else git_hash(data)
            sent = bytes(len(data)) if large and repo in hub.false_content else data
            first = 0
            if large and self.command == "GET":
                asked = self.headers.get("Range", "")
                hub.ranges.append(asked)
                first = int(asked.removeprefix("bytes=").partition("-")[0] or 0)
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            self._end(sent[first:], etag, cut=hub.cut_after if large else None)

        def _json(self, value: Any) -> None:
            self.send_response(200)
            self._end(json.dumps(value).encode(), "0")

        def _end(self, data: bytes, etag: str, *, cut: int | None = None) -> None:
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(data if cut is None else data[:cut])
            if cut is not None:
                hub.cut_after, hub.gone = None, hub.gone_then
                self.close_connection = True

        def _no(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
    return entry


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """The stand-in, with its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
