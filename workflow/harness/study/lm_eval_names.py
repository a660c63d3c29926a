"""Names of lm-eval's tasks, groups and tags, read from its installed files: importing it would take seconds."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

_KEY = re.compile(r"""^(["']?)(?:task|group|tag)\1[ \t]*:[ \t]*(.*)$((?:\n[ \t]*-[ \t].*)*)""", re.MULTILINE)
_COMMENT = re.compile(r"\s#.*")
_ITEM = re.compile(r"^-[ \t]+(?:(?:task|group)[ \t]*:[ \t]*)?")
_OTHER = (".py", ".pyc", ".md", ".json", ".jsonl", ".txt", ".csv", ".tsv", ".ipynb", ".png", ".sh")


def tasks_folder() -> Path | None:
    """The folder of lm-eval's own task files; None where lm-eval is not installed, as on a bare GPU machine."""
    spec = importlib.util.find_spec("lm_eval")
    return Path(spec.origin).parent / "tasks" if spec is not None and spec.origin is not None else None


@cache
def task_names() -> frozenset[str]:
    """Every name in lm-eval's task files; empty where lm-eval is not installed. About a second, for 14,000 files."""
    folder = tasks_folder()
    # files that others include often have no suffix, or one such as _yaml, and hold the tags
    files = [] if folder is None else [f for f in folder.rglob("*") if f.suffix not in _OTHER and f.is_file()]
    return frozenset(name for file in files for name in _names(file.read_text(encoding="utf-8", errors="replace")))


def _names(text: str) -> Iterator[str]:
    for match in _KEY.finditer(text):
        for line in [match.group(2), *match.group(3).splitlines()]:
            plain = _ITEM.sub("", _COMMENT.sub("", line).strip()).strip("[]")
            yield from filter(None, (name.strip().strip("\"'") for name in plain.split(",")))


def unknown_task(name: str, known: Iterable[str]) -> str:
    """What to tell a user whose task does not exist, with the nearest names."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"lm-eval has no task, group or tag {name!r}; " + (
        f"nearest: {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
    )
