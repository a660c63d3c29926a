"""A stand-in for the hub's servers: one data set, one closed, one revision; everything else is not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

REVISION = "a" * 40
OPEN, CLOSED = "org/open", "org/closed"
CARD = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test.jsonl\n---\n"
FILES = {"README.md": CARD.encode(), "main/test.jsonl": b'{"q": "1 + 1?", "a": "2"}\n{"q": "2 + 2?", "a": "4"}\n'}


class _Hub(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if CLOSED in path:
            return self._no(403, "GatedRepo")
        if OPEN not in path:
            return self._no(404, "RepoNotFound")
        if REVISION not in path:
            return self._no(404, "RevisionNotFound")
        if "/resolve/" in path:
            data = FILES.get(path.partition(f"/resolve/{REVISION}/")[2])
            return self._no(404, "EntryNotFound") if data is None else self._yes(data)
        if "/tree/" in path:
            folder = path.partition(f"/tree/{REVISION}")[2].strip("/")
            inside = [name for name in FILES if name.startswith(f"{folder}/" if folder else "")]
            return self._json([{"type": "file", "path": name, "size": len(FILES[name]), "oid": "0"} for name in inside])
        siblings = [{"rfilename": name} for name in FILES]
        return self._json({"id": OPEN, "sha": REVISION, "siblings": siblings, "private": False, "tags": []})

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        found = [name for name in FILES if name in asked]
        self._json([{"type": "file", "path": name, "size": len(FILES[name]), "oid": "0"} for name in found])

    def _json(self, value: Any) -> None:
        self._yes(json.dumps(value).encode())

    def _yes(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _no(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def data_hub() -> Iterator[str]:
    """The address of a running stand-in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
