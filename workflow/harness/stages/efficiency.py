"""`python -m harness efficiency`: measure memory and speed of a training step on one GPU, or forecast its memory."""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError, missing_package

if TYPE_CHECKING:
    from harness.efficiency.spec import EfficiencyStudy
    from harness.efficiency.store import Store

Report = Callable[[], str]
"""Makes tables and figures of what is on disk, and says what it made."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    from harness.efficiency.budget import BUDGET_S, REPORT_S

    parser.add_argument("--config", type=Path, default=Path("config/efficiency.yaml"), help="the study's file")
    parser.add_argument("--out", type=Path, default=Path("results/efficiency"), help="folder for everything")
    parser.add_argument("--published", type=Path, default=Path("config/published/grass.yaml"), help="published numbers")
    parser.add_argument(
        "--budget",
        type=float,
        help=f"seconds, {REPORT_S:.0f} of them for the report; default {BUDGET_S:.0f}, and no end for forecasts",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="a CPU rehearses on the tiny model")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="GLOB",
        help="model/method/settings/shape, or with --peers one of our methods; may be given again",
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats of each cell")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a repeat, a multiple of 5")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them, a multiple of 5")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--forecast", action="store_true", help="no device: forecast memory, and report")
    instead.add_argument("--overhead", action="store_true", help="what GRASS costs beside AdamW, and moving its states")
    instead.add_argument("--peers", action="store_true", help="our methods beside other people's code for the same")
    instead.add_argument("--report", action="store_true", help="tables and figures of the records in --out alone")
    parser.add_argument("--cores", type=int, default=2, help="forecasts side by side")


def run(args: argparse.Namespace) -> int:
    """Measure or forecast, then write tables and figures; 1 if a cell failed by a fault of the program."""
    from harness.efficiency.spec import load_efficiency
    from harness.efficiency.store import Store
    from harness.progress import say

    _check(args)
    study, store = load_efficiency(args.config), Store(args.out)
    if args.overhead:
        return _overhead(args, study)
    if args.peers:
        return _peers(args)
    report = _reporter(args, study, store)
    if args.report:
        if not (args.out / "records").is_dir():
            raise UserError(f"--out {args.out}: no records there; name the folder that has them as records/*.json")
        say(f"{report()}; all in {store.folder}")
        return 0
    return (_forecast if args.forecast else _measure)(args, study, store, report)


def _overhead(args: argparse.Namespace, study: EfficiencyStudy) -> int:
    from harness.efficiency.budget import BUDGET_S, Budget
    from harness.efficiency.store import MeasureOptions
    from harness.measuring.gpu import NoGpuError, lease_for
    from harness.measuring.meters import Meters

    asked = MeasureOptions(device=args.device, warmup_steps=args.warmup, timed_steps=args.steps, repeats=args.repeats)
    budget = Budget(BUDGET_S if args.budget is None else args.budget)
    try:
        # meters before torch touches the device
        with lease_for(args.device), closing(Meters(args.device)) as meters:
            from harness.efficiency.overhead import measure_overhead

            gc.freeze()  # garbage is collected before each block, and is not looked for among all that was imported
            measure_overhead(study, meters, asked, budget, config=args.config, folder=args.out)
    except NoGpuError as error:
        raise UserError(f"{error}; or rehearse on the tiny model (--device cpu)") from error
    return 0


def _peers(args: argparse.Namespace) -> int:
    from harness.efficiency.budget import Budget
    from harness.efficiency.store import write_session
    from harness.measuring.gpu import NoGpuError, lease_for
    from harness.measuring.meters import Meters
    from harness.progress import say

    try:
        with lease_for(args.device), closing(Meters(args.device)) as meters:
            from harness.efficiency.peers.measure import measure_peers

            record = measure_peers(meters, Budget(args.budget), least=args.steps, most=3 * args.steps, only=args.only)
    except NoGpuError as error:
        raise UserError(f"{error}; or measure on this machine's processor (--device cpu)") from error
    say(f"all of it, units in the keys: {write_session(record, args.out / 'peers')}")
    try:
        from harness.reporting.efficiency.peers_table import write_peers
    except ModuleNotFoundError as error:
        if missing_package(error) is None:
            raise
        say("no table here (run `python -m harness efficiency --report` where pandas is)")
        return 0
    write_peers(args.out / "peers")
    return 0


def _reporter(args: argparse.Namespace, study: EfficiencyStudy, store: Store) -> Report:
    """What makes tables and figures; a machine that only measures may lack what they need, and keeps its records."""
    try:
        from harness.reporting.efficiency.published_table import check_published
        from harness.reporting.efficiency.report import write_report
        from harness.reporting.published import load_published
    except ModuleNotFoundError as error:
        if args.report or missing_package(error) is None:
            raise
        return lambda: (
            "no tables and figures here (run `python -m harness efficiency --report` where pandas and matplotlib are)"
        )
    published = load_published(args.published)
    if study.published is not None:
        check_published(args.config, study.published, published)
    return lambda: f"{len(write_report(study, store, published))} figures"


def _measure(args: argparse.Namespace, study: EfficiencyStudy, store: Store, report: Report) -> int:
    from harness.efficiency.budget import BUDGET_S, Budget
    from harness.efficiency.plan import plan
    from harness.efficiency.session import run_session
    from harness.efficiency.store import MeasureOptions
    from harness.measuring.gpu import NoGpuError
    from harness.progress import say
    from harness.records import atomic

    budget = Budget(BUDGET_S if args.budget is None else args.budget)
    groups = plan(study, args.device, args.only)
    asked = MeasureOptions(device=args.device, warmup_steps=args.warmup, timed_steps=args.steps, repeats=args.repeats)
    try:
        outcome = run_session(groups, asked, store, budget, cores=args.cores)
    except NoGpuError as error:
        raise UserError(f"{error}; or forecast (--forecast), or rehearse on the tiny model (--device cpu)") from error
    made = report()
    atomic.write_json(store.folder / "coverage.json", outcome.coverage(asked, budget, args.only))
    say(
        f"{outcome.measured} blocks measured in {budget.spent():.0f} s, {outcome.kept} needed none, "
        f"{len(outcome.missing)} not measured; {made}; all in {store.folder}"
    )
    for line in outcome.lines():
        say(f"  {line}")
    return 1 if outcome.errors else 0


def _forecast(args: argparse.Namespace, study: EfficiencyStudy, store: Store, report: Report) -> int:
    from harness.efficiency.budget import Budget
    from harness.efficiency.forecasts import fill_forecasts
    from harness.efficiency.plan import cells, every_group, select
    from harness.progress import say

    entries = cells(select(every_group(study), args.only))
    failed = fill_forecasts(entries, store, Budget(args.budget), cores=args.cores)
    made = report()
    known = sum(map(store.has_fresh_forecast, entries))
    say(f"{known} of {len(entries)} cells have a forecast; {made}; all in {store.folder}")
    for line in failed:
        say(f"error: {line}")
    return 1 if failed else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options out of range, and a folder in which nothing can be written."""
    from harness.efficiency.arithmetic import PERIOD

    for option, least in (("repeats", 1), ("cores", 1), ("steps", PERIOD), ("warmup", 0)):
        value = getattr(args, option)
        if value < least or (option in ("steps", "warmup") and value % PERIOD):
            whole = f"a multiple of {PERIOD}" if option in ("steps", "warmup") else "a whole number"
            raise UserError(f"--{option} {value}: {whole} of at least {least} is wanted")
    if args.budget is not None and args.budget <= 0:
        raise UserError(f"--budget {args.budget:g}: a number of seconds above 0 is wanted")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as error:
        raise UserError(f"--out {args.out}: nothing can be written there ({error.strerror})") from error
