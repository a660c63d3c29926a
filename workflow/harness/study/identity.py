"""Models known by their content: is what lies in a folder still the model that records were made from?

A job's name holds a model's path, and `${NAME}` in it may point elsewhere tomorrow. So the manifest's hashes decide.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.errors import UserError
from harness.records.atomic import sha256, write_json
from harness.records.inputs import ModelRecord
from harness.records.reading import read
from harness.study.paths import resolve

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""The files of a model folder that transformers reads weights from."""
_TEXTS = ("*.json", "*.model", "*.txt", "*.jinja")
_STAMPS = "stamps.json"

Stamp = list[int]
"""Size (bytes), modification and change time (ns) and inode of a file. The change time cannot be set by hand."""


def files_of(folder: Path) -> list[Path]:
    """The files that make a model what it is: weights, configuration, tokenizer; sorted by name."""
    found = {file for pattern in (*WEIGHTS, *_TEXTS) for file in folder.glob(pattern) if file.is_file()}
    return sorted(found - {folder / "manifest.json"})


def known_model(manifest: Path) -> ModelRecord:
    """The record of a model, once its folder is known to hold that model.

    Raises:
        UserError: there is no such record, a `${NAME}` in it is not set, or the folder holds another model.
    """
    record = read(manifest, ModelRecord)
    name = changed_file(record, manifest.parent)
    if name is not None:
        raise UserError(another_model(record, manifest, name))
    return record


def another_model(record: ModelRecord, manifest: Path, name: str) -> str:
    """What to say where the file `name` of a model is not the recorded one.

    Snakemake does not make a manifest anew that only finished runs need, so those are to be removed with it.
    """
    here, runs = str(resolve(record.folder)), manifest.parents[3] / "runs" / f"{record.name.partition('--')[0]}--*"
    return (
        f"{record.folder}{'' if here == record.folder else f', now {here},'} holds another model than {manifest} was "
        f"made from: {name} differs; give the new model a label of its own in the config, or remove {manifest.parent} "
        f"and {runs} to make everything from it anew"
    )


def replaced_models(manifests: Iterable[Path], *, dry_run: bool = False) -> dict[Path, str]:
    """Of the manifests that are there, those whose folder holds another model now, with what to say.

    A folder that is not there, or whose `${NAME}` is not set, is left to the job that needs it. A dry run writes
    nothing.
    """
    found = {}
    for manifest in manifests:
        if manifest.is_file():
            record = read(manifest, ModelRecord)
            try:
                name = (
                    changed_file(record, manifest.parent, dry_run=dry_run) if resolve(record.folder).is_dir() else None
                )
            except UserError:
                continue
            if name is not None:
                found[manifest] = another_model(record, manifest, name)
    return found


def changed_file(record: ModelRecord, folder: Path, *, dry_run: bool = False) -> str | None:
    """The first file of a model that is not the one that was recorded, that is gone or has come; None if all are.

    A file is hashed unless its stamp is the one that it had when it was last found to be the recorded one. Those stamps
    are kept in `folder`, beside the record; a dry run does not renew them.

    Raises:
        UserError: a `${NAME}` in the record is not set.
    """
    model, stamps = resolve(record.folder), folder / _STAMPS
    files = {file.name: file for file in files_of(model)}
    for name in sorted(files.keys() ^ record.files_sha256.keys()):
        return name
    seen = _read_stamps(stamps)
    now = {name: _stamp(file) for name, file in files.items()}
    for name, file in files.items():
        if seen.get(name) != now[name] and sha256(file) != record.files_sha256[name]:
            return name
    if seen != now and not dry_run:
        write_json(stamps, now)
    return None


def stamp_files(files: Sequence[Path], folder: Path) -> None:
    """Note in `folder` that these files are the ones that its record was just made from."""
    write_json(folder / _STAMPS, {file.name: _stamp(file) for file in files})


def _stamp(file: Path) -> Stamp:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read_stamps(path: Path) -> dict[str, Stamp]:
    """What was noted; nothing where the file is absent or unreadable, and every file is then hashed."""
    try:
        found: dict[str, Stamp] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
