"""`python -m harness forecast`: peak memory of a fine-tuning step, with no GPU and no weights.

Of one step, printed: --model and --method. Of a study's run, as the pipeline asks for it: --spec; the forecast is
written beside the spec, and a run that cannot fit its GPU then never starts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--model", help="a model of the study, or a folder with a config.json")
    asked.add_argument("--spec", type=Path, help="results/forecasts/<forecast>/spec.json; all else is in it")
    parser.add_argument("--config", type=Path, default=Path("config/efficiency.yaml"), help="an efficiency study")
    parser.add_argument("--method", help="a method of the study")
    parser.add_argument("--settings", default="plain", help="settings of the study, such as plain or lean")
    parser.add_argument("--batch", type=int, default=1, help="rows of the micro-batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--active-layers", type=int, help="layers that train at a time, for methods that draw layers")
    parser.add_argument("--offload", choices=["move", "resident", "auto"], help="where GRASS keeps moments")
    parser.add_argument("--json", action="store_true", help="print JSON, bytes as integers")


def output(args: argparse.Namespace) -> Path | None:
    """What the job writes; None where the forecast is printed."""
    spec: Path | None = args.spec
    return None if spec is None else spec.parent / "forecast.json"


def run(args: argparse.Namespace) -> int:
    """Forecast a step or a run; 0 also where there is no forecast, which is an answer."""
    if args.spec is not None:
        return _of_run(args.spec)
    if args.method is None:
        raise UserError("--method is needed beside --model: name a method of the study")
    return _of_step(args)


def _of_run(spec: Path) -> int:
    """Write forecast.json beside the spec of a run's forecast."""
    from harness.forecasting.run_forecast import forecast_run
    from harness.records import atomic
    from harness.records.units import gib
    from harness.study.identity import known_model
    from harness.study.jobs import FORECAST, MODEL, ForecastJob, read_job
    from harness.study.paths import Paths, resolve
    from harness.study.progress import announce

    job = read_job(spec, ForecastJob, spec.parent.name)
    paths, training = Paths(spec.parents[2]), job.training
    model = known_model(paths.output(MODEL, training.model.name))
    found = forecast_run(training, name=job.name, model=resolve(model.folder), rows=paths.rows(training.rows.name))
    atomic.write_record(paths.output(FORECAST, job.name), found)
    said = f"no forecast: {found.peak_why}" if found.peak_bytes is None else f"{gib(found.peak_bytes)} GiB"
    announce(f"forecast {job.name}: {said}")
    return 0


def _of_step(args: argparse.Namespace) -> int:
    """Print the forecast of one step, or why there is none; nothing is written."""
    from harness.efficiency.spec import cell_of, load_efficiency
    from harness.step.spec import shape_of

    study, shape = load_efficiency(args.config), shape_of(args.batch, args.length)
    cell = cell_of(study, model=args.model, method=args.method, settings=args.settings, shape=shape)
    changes = {"active_layers": args.active_layers, "offload": args.offload}
    cell = cell.with_options(**{name: value for name, value in changes.items() if value is not None})

    from harness.forecasting.forecast import NoForecastError, forecast
    from harness.forecasting.show import as_json, as_text
    from harness.step.outcomes import CannotRunError

    try:
        found, reason = forecast(cell), None
    except (CannotRunError, NoForecastError) as error:
        found, reason = None, str(error)
    if args.json:
        print(json.dumps(as_json(cell, found, reason=reason), indent=2))
    elif found is None:
        print(f"no forecast: {reason}")
    else:
        options = "".join(f", {name} {value}" for name, value in changes.items() if value is not None)
        title = f"{args.model}, {args.method}, {args.settings}, {args.batch} x {args.length} tokens{options}"
        print(as_text(title.replace("active_layers", "active layers"), found))
    return 0
