"""`python -m harness forecast`: peak memory of a fine-tuning step, with no GPU and no weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--config", type=Path, default=Path("config/efficiency.yaml"), help="an efficiency study")
    parser.add_argument("--model", required=True, help="a model of the study, or a folder with a config.json")
    parser.add_argument("--method", required=True, help="a method of the study")
    parser.add_argument("--settings", default="plain", help="settings of the study, such as plain or lean")
    parser.add_argument("--batch", type=int, default=1, help="rows of the micro-batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--active-layers", type=int, help="layers that train at a time, for methods that draw layers")
    parser.add_argument("--offload", choices=["move", "resident", "auto"], help="where GRASS keeps moments")
    parser.add_argument("--json", action="store_true", help="print JSON, bytes as integers")


def run(args: argparse.Namespace) -> int:
    """Print the forecast, or why there is none; nothing is written."""
    from harness.step.spec import cell_of, load_efficiency, shape_of

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
