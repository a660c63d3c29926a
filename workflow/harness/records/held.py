"""Files are held to the hashes that the record beside them has: what was changed since is named, and never used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from harness.errors import UserError
from harness.records.atomic import sha256


def hashes(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """sha256 of files in or below a folder, by their path from there."""
    return {str(file.relative_to(folder)): sha256(file) for file in sorted(files)}


def check_files(record: Path, files_sha256: Mapping[str, str]) -> None:
    """Hold files to their hashes.

    Args:
        record: the file that has the hashes; paths count from its folder.
        files_sha256: what it says of the files that are about to be used.

    Raises:
        UserError: one is gone, or is not what was written.
    """
    for name, value in files_sha256.items():
        file = record.parent / name
        if not file.is_file():
            raise UserError(f"{file}: no such file, though {record.name} beside it names it; {_mend(record)}")
        if sha256(file) != value:
            raise UserError(f"{file}: not the file that {record.name} was written with; {_mend(record)}")


def _mend(record: Path) -> str:
    return f"put it back, or remove {record} and run again"
