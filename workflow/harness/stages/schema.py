"""`python -m harness schema`: write the JSON schemas of configs and records, for editors and CI's check."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pydantic import BaseModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--out", type=Path, default=Path("workflow/schemas"))
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is out of date")


def run(args: argparse.Namespace) -> int:
    """One schema a model that is written or read as a file."""
    from harness.efficiency.spec import EfficiencyStudy
    from harness.records import atomic, inputs
    from harness.records import run as record
    from harness.study import jobs, spec

    models: dict[str, type[BaseModel]] = {
        "study": spec.Study,
        "efficiency-study": EfficiencyStudy,
        "run-spec": jobs.RunJob,
        "train-record": record.TrainRecord,
        "overlap-record": inputs.OverlapRecord,
        "probe-record": record.ProbeRecord,
        "eval-record": record.EvalRecord,
        "search-record": record.SearchRecord,
        "forecast-record": record.RunForecast,
    }
    old = []
    for name, model in models.items():
        path = args.out / f"{name}.json"
        text = json.dumps(model.model_json_schema(), indent=2, sort_keys=True) + "\n"
        if args.check:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                old.append(str(path))
        else:
            atomic.write_text(path, text)
    if old:
        print(f"out of date: {', '.join(old)}; run `python -m harness schema` and commit")
    return 1 if old else 0
