"""Content of the files that a user brings: a job runs again for other content, not for a newer date or folder.

Snakemake keeps it as a param of the job that reads the files. Imports no torch.
"""

from __future__ import annotations

from functools import cache

from harness.errors import UserError
from harness.records.atomic import sha256
from harness.study.paths import resolve
from harness.study.sources import FileRows, FileSuite, ReadRows, RowSource, SuiteSource


def of_rows(source: RowSource) -> list[str | None]:
    """Hashes of the files of training rows, and of those that these must not repeat."""
    files = [path for path, _ in source.files] if isinstance(source, FileRows) else []
    return [_content(text) for text in (*files, *(source.without if isinstance(source, ReadRows) else ()))]


def of_suite(source: SuiteSource) -> str | None:
    """Hash of a suite's file; None for suites that have none."""
    return _content(source.path) if isinstance(source, FileSuite) else None


@cache
def _content(text: str) -> str | None:
    """Hash of a file; None where it is missing, as it may be in a dry run."""
    try:
        file = resolve(text)
    except UserError:
        return None
    return sha256(file) if file.is_file() else None
