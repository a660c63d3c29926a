"""Reads what jobs wrote: records, specs and manifests. Errors name the file that is damaged or not one of ours."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from harness.errors import UserError, first_line
from harness.records.record import SCHEMA_VERSION

Model = TypeVar("Model", bound=BaseModel)

_AGAIN = "if this is the file that is meant, delete it and run again"
_LOG_AGAIN = "delete the record beside it and run again"


class Origin(BaseModel):
    """Of a record's provenance: the code that made it, see `harness.records.code`."""

    source_sha256: str
    sources: dict[str, str] = {}


class Stamp(BaseModel):
    """What records of every kind say: which code made them, and how the job ended where one can end badly."""

    provenance: Origin
    status: str = ""


def read(path: Path, model: type[Model]) -> Model:
    """The record, spec or manifest in the file `path`.

    Raises:
        UserError: no such file, or it holds no `model`; the message names the file, the fault and the remedy.
    """
    text = _unsealed(path, _text(path))
    try:
        # strict models take a tuple from a JSON array only when they read the JSON themselves
        return model.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{path}: {_complaint_of(error, text)}; {_AGAIN}") from error


def read_json(path: Path) -> Any:
    """Content of the JSON file `path`.

    Raises:
        UserError: no such file, or it is not JSON.
    """
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({first_line(error)}); {_AGAIN}") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Inverse of `harness.records.atomic.write_jsonl`.

    Raises:
        UserError: no such file, or a line that is no JSON object.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({first_line(error)}); {_LOG_AGAIN}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a JSON object is wanted; {_LOG_AGAIN}")
        rows.append(row)
    return rows


def _unsealed(path: Path, text: bytes) -> bytes:
    """A record without its seal; one that was written without a seal is taken as it is.

    Raises:
        UserError: the record is not what was written.
    """
    body, sign, seal = text.rpartition(b',\n  "seal": "')
    if sign and seal != hashlib.sha256(body).hexdigest().encode() + b'"\n}\n':
        raise UserError(
            f"{path}: changed since it was written, by hand or by a fault of the disk; delete it and run again"
        )
    return body + b"\n}\n" if sign else text


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the path, or run the job that writes it") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder stands where a file should be; remove it and run again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file that you may read") from error


def _complaint_of(error: ValidationError, text: bytes) -> str:
    """What is wrong with a file, in a few words."""
    # an unknown key is reported before a missing one: it may be a misspelling of the missing key
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key, kind = ".".join(map(str, first["loc"])), first["type"]
    if kind == "json_invalid":
        return f"not JSON ({first['ctx']['error']})"
    written = _schema_version(text)
    if written not in (None, SCHEMA_VERSION):
        return f"written by schema version {written}, and this program reads version {SCHEMA_VERSION}"
    if kind == "extra_forbidden":
        return f"unknown key {key}"
    if kind == "missing":
        return f"the key {key} is missing"
    return f"{key}: {first['msg']}" if key else first["msg"]


def _schema_version(text: bytes) -> Any:
    """Schema version stated in a record; None where it states none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # what pydantic reads and Python does not, such as 5000 digits
        return None
    origin = value.get("provenance") if isinstance(value, dict) else None
    return origin.get("schema_version") if isinstance(origin, dict) else None
