"""`python -m harness fit`: forecast the peak memory of a run, so that one that cannot fit its GPU never starts."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--spec", type=Path, required=True, help="results/forecasts/<forecast>/spec.json")


def run(args: argparse.Namespace) -> int:
    """Write forecast.json beside the spec; needs no GPU."""
    from harness.forecasting.fit import GIB, foresee
    from harness.inputs.models import model_folder
    from harness.records import atomic
    from harness.records.reading import read
    from harness.records.run import ModelRecord
    from harness.study.paths import Places
    from harness.study.progress import announce
    from harness.study.spec import FitJob

    job = read(args.spec, FitJob)
    folder: Path = args.spec.parent
    places, training = Places(folder.parents[1]), job.training
    manifest = read(places.model(training.model.name) / "manifest.json", ModelRecord)
    found = foresee(training, name=job.name, model=model_folder(manifest), rows=places.rows(training.rows.name))
    atomic.write_json(folder / "forecast.json", found.model_dump(mode="json"))
    said = f"no forecast: {found.peak_why}" if found.peak_bytes is None else f"{found.peak_bytes / GIB:.2f} GiB"
    announce(f"forecast {job.name}: {said}")
    return 0
