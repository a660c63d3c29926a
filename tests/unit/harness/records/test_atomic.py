"""Files and folders are whole or absent, and what a killed writer left goes with the next one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.errors import UserError
from harness.records import atomic
from harness.records.atomic import whole_file, whole_folder, write_json, write_many_json, write_text

WRITE = """
import sys
from pathlib import Path
from harness.records import atomic
with getattr(atomic, sys.argv[1])(Path(sys.argv[2])) as temporary:
    (temporary / "inner" if temporary.is_dir() else temporary).write_text("half")
    print(temporary, flush=True)
    sys.stdin.readline()
"""
KINDS = ("whole_file", "whole_folder")


def writing(kind: str, path: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, kind, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def write(kind: str, path: Path) -> None:
    if kind == "whole_file":
        write_text(path, "whole")
    else:
        with whole_folder(path) as temporary:
            (temporary / "inner").write_text("whole")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_writer_left_goes_with_the_next(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model[1]"
    process, left = writing(kind, path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left.exists()
    assert not path.exists()
    other = tmp_path / ".model.1.part"
    other.write_text("of another file")
    write(kind, path)
    assert not left.exists()
    assert sorted(tmp_path.iterdir()) == sorted([path, other])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_living_writer_has_stays(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    process, half = writing(kind, path)
    write(kind, path)
    assert half.exists()
    process.communicate("\n", timeout=20)
    assert process.returncode == 0
    assert (path if kind == "whole_file" else path / "inner").read_text() == "half", "the last to end"
    assert list(tmp_path.iterdir()) == [path]


class TornError(Exception):
    """As a library's own error, in whose handling the disk's is lost but for its context."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "the disk of"), (errno.EROFS, "must not be written to")])
def test_what_is_wrong_with_the_disk_is_one_line_and_the_old_one_stays(
    kind: str, code: int, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    write(kind, path)

    def written() -> None:
        with getattr(atomic, kind)(path):
            try:
                raise OSError(code, os.strerror(code))
            except OSError:
                raise TornError from None

    with pytest.raises(UserError, match=f"^{path} cannot be written: .*{said}") as told:
        written()
    assert "\n" not in str(told.value)
    assert (path if kind == "whole_file" else path / "inner").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_another_file_is_not_the_disks(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), whole_file(tmp_path / "model"):
        raise PermissionError(errno.EACCES, "no", "/elsewhere/token")


def test_a_disk_that_is_full_keeps_what_it_has(small_disk: Path) -> None:
    write_text(small_disk / "kept", "whole")
    with pytest.raises(
        UserError, match=r"the disk of .* is full: 0\.0 MiB are free, about 8\.0 MiB are needed; free some"
    ):
        fill(small_disk / "kept")
    assert [path.name for path in small_disk.iterdir()] == ["kept"]
    assert (small_disk / "kept").read_text() == "whole"


def fill(path: Path) -> None:
    with whole_file(path, needs_bytes=8 * 2**20) as temporary:
        temporary.write_bytes(bytes(8 * 2**20))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 4 MiB; skips where none may be mounted."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def fail_within(kind: str, path: Path) -> None:
    with (whole_file if kind == "whole_file" else whole_folder)(path) as temporary:
        (temporary / "inner" if temporary.is_dir() else temporary).write_text("half")
        raise RuntimeError


@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_that_fails_leaves_the_old_one(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    write(kind, path)
    with pytest.raises(RuntimeError):
        fail_within(kind, path)
    assert (path if kind == "whole_file" else path / "inner").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_many_files_are_what_single_ones_are_and_the_disk_is_waited_for_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []
    monkeypatch.setattr(atomic.os, "sync", lambda: waits.append(len(list(tmp_path.glob("*/spec.json")))))
    monkeypatch.setattr(atomic.os, "fsync", lambda _: pytest.fail("a file was waited for alone"))
    write_many_json((tmp_path / str(n) / "spec.json", {"job": n}) for n in range(401))
    assert waits == [0, 200, 400], "no file has its name before its content is on the disk"
    monkeypatch.undo()
    write_json(tmp_path / "one.json", {"job": 400})
    assert (tmp_path / "400" / "spec.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert not list(tmp_path.glob("*/.*"))
