"""The kinds of files that people and jobs hand to the harness, each with valid ones and what reads them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import reporting_data
import yaml
from harness.efficiency.plan import every_group
from harness.efficiency.record import ForecastRecord
from harness.efficiency.spec import load_efficiency
from harness.records.inputs import ModelRecord, RowsRecord
from harness.records.reading import Stamp, read, read_json, read_jsonl
from harness.records.run import EvalRecord, ProbeRecord, SearchRecord, TrainRecord
from harness.reporting.frames import read_table
from harness.reporting.published import load_published, published_table
from harness.study.config import load_study
from harness.study.jobs import RunJob
from harness.study.plan import resolve_study
from house import ROOT
from hypothesis import strategies as st

from tests.fuzz.changes import as_json, as_jsonl, as_yaml, changed, garbled

RECORDS = ROOT / "results" / "published"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of file."""

    name: str
    file: str
    """Its name in a folder of its own."""
    contents: st.SearchStrategy[bytes]
    use: Callable[[Path], object]


def _study(path: Path) -> object:
    return resolve_study(load_study(path, inputs_needed=False))


def _efficiency(path: Path) -> object:
    return every_group(load_efficiency(path))


@cache
def _frames() -> Any:
    return reporting_data.frames()


def _published(path: Path) -> object:
    table = published_table(_frames(), load_published(path))
    return table.markdown(), table.latex(), table.page()


def _record(model: type[Any]) -> Callable[[Path], object]:
    def use(path: Path) -> object:
        return read(path, model), read(path, Stamp)

    return use


def _of(files: Sequence[Path], load: Callable[[str], Any], dump: Callable[[Any], str]) -> st.SearchStrategy[bytes]:
    values = [load(file.read_text(encoding="utf-8")) for file in files]
    return st.sampled_from(values).flatmap(lambda value: changed(value, dump))


def _yaml(*patterns: str) -> st.SearchStrategy[bytes]:
    files = sorted(file for pattern in patterns for file in (ROOT / "config").glob(pattern))
    return _of(files, yaml.safe_load, as_yaml)


def _json(pattern: str) -> st.SearchStrategy[bytes]:
    # of thousands of records that differ by numbers alone a few are enough
    files = sorted(RECORDS.glob(pattern))
    assert files, f"no published record {pattern}"
    return _of(files[:: max(1, len(files) // 5)], json.loads, as_json)


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


_DOCUMENTS = [
    {"run": "r", "suite": "s", "document": i, "correct": True, "parsed": True, "prediction": "7", "gold": "7",
     "loss": 0.5, "tokens": 3}
    for i in range(3)
]  # fmt: skip
_STEPS = [{"step": i, "loss": 1.5 - 0.1 * i, "lr_factor": 1.0, "grad_norm": None, "tokens": 9} for i in range(4)]


def _of_bytes(data: bytes) -> st.SearchStrategy[bytes]:
    text = data.decode("latin-1")
    return garbled(text).map(lambda new: new.decode("utf-8", "replace").encode("latin-1", "replace"))


@cache
def kinds() -> tuple[Kind, ...]:
    """All kinds."""
    studies = [f"{name}.yaml" for name in ("embedded", "importance", "local", "paper", "small", "zoo")]
    made = [
        ("train.json", TrainRecord, "zoo/records/runs/*/train.json"),
        ("scores.json", EvalRecord, "zoo/records/runs/*/eval/*.json"),
        ("search.json", SearchRecord, "local/records/searches/*/search.json"),
        ("probe.json", ProbeRecord, "importance/records/probes/*/probe.json"),
        ("model.json", ModelRecord, "*/records/inputs/models/*/manifest.json"),
        ("rows.json", RowsRecord, "*/records/inputs/rows/*/manifest.json"),
    ]
    return (
        Kind(name="study config", file="study.yaml", contents=_yaml(*studies), use=_study),
        Kind(name="efficiency config", file="efficiency.yaml", contents=_yaml("efficiency.yaml"), use=_efficiency),
        Kind(name="published numbers", file="paper.yaml", contents=_yaml("published/*.yaml"), use=_published),
        *(
            Kind(name=f"record {model.__name__}", file=file, contents=_json(pattern), use=_record(model))
            for file, model, pattern in made
        ),
        Kind(
            name="record ForecastRecord",
            file="cell.json",
            contents=_json("efficiency/records/*forecast*.json"),
            use=lambda path: read(path, ForecastRecord),
        ),
        Kind(
            name="spec of a run",
            file="spec.json",
            contents=_json("zoo/records/runs/*/spec.json"),
            use=lambda path: read(path, RunJob),
        ),
        Kind(name="log of steps", file="steps.jsonl", contents=changed(_STEPS, as_jsonl), use=read_jsonl),
        Kind(name="captions", file="figures.json", contents=changed({"a": {"caption": "x"}}, as_json), use=read_json),
        Kind(
            name="parquet documents",
            file="documents.parquet",
            contents=st.one_of(_of_bytes(_parquet(_DOCUMENTS)), changed(_DOCUMENTS, as_json)),
            use=lambda path: read_table(path, mend="delete it and run again"),
        ),
    )
