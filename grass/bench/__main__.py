"""Command line of the benchmark: `python -m grass.bench --help`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from grass.bench.comparison import measure_device
from grass.bench.device import GEOMETRIES, DeviceSettings
from grass.bench.host import HostSettings, measure_host

PARTS = ("host", "device")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the JSON file that was asked for."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.timed % given.period:
        parser.error(f"--timed must be a multiple of --period ({given.period}), not {given.timed}")
    torch.set_num_threads(given.threads)
    found: dict[str, Any] = {}
    if "host" in given.parts:
        print("host: what GRASS costs beside torch's AdamW; median (quartiles) of neighbouring rounds", flush=True)
        found["host"] = measure_host(HostSettings(**_picked(HostSettings, given)))
    if "device" in given.parts:
        device = given.device or ("cuda:0" if torch.cuda.is_available() else None)
        if device is None:
            print("device: not measured: no CUDA device")
            found["device"] = {"not_measured": ["no CUDA device"]}
        else:
            print(f"device: what moving states costs on {device}, geometry {given.geometry}", flush=True)
            found["device"] = measure_device(DeviceSettings(**{**_picked(DeviceSettings, given), "device": device}))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m grass.bench",
        description="Ratios of times, each pair measured by turns in this one run. Nothing is asserted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    host, device = HostSettings(), DeviceSettings(device="")
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    add("--json", type=Path, metavar="PATH", help="write every number there, units in the keys")
    add("--threads", type=int, default=1, help="threads of torch")
    add("--layers", type=int, default=host.layers, help="host: decoder layers")
    add("--width", type=int, default=host.width, help="host: their width; 12 width^2 parameters each")
    add("--tokens", type=int, default=host.tokens, help="host: tokens of a row, 4 rows a step")
    add("--step-rounds", type=int, default=host.step_rounds, help="host: rounds of one step of each optimizer")
    add("--periods", type=int, default=host.periods, help="host: sampling periods whose bookkeeping is measured")
    add("--device", help="device: where; None: cuda:0, if there is one")
    add("--geometry", choices=GEOMETRIES, default=device.geometry, help="device: the model; tiny is for rehearsal")
    add("--batch", type=int, default=device.batch, help="device: rows of a batch")
    add("--length", type=int, default=device.length, help="device: tokens of a row")
    add("--warmup", type=int, default=device.warmup, help="device: steps before the timed ones of a cell")
    add("--timed", type=int, default=device.timed, help="device: timed steps of a cell, whole periods")
    add("--period", type=int, default=device.period, help="device: steps between draws")
    add("--rounds", type=int, default=device.rounds, help="device: timed cells of every variant")
    add(
        "--budget",
        type=float,
        default=device.budget_s,
        dest="budget_s",
        help="device: seconds; no cell is begun that would not fit",
    )
    return parser


def _picked(settings: type, given: argparse.Namespace) -> dict[str, Any]:
    return {field.name: getattr(given, field.name) for field in fields(settings)}


if __name__ == "__main__":
    raise SystemExit(main())
