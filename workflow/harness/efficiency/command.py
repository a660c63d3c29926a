"""What `python -m harness efficiency` does, from its arguments to its last line. No torch in this process."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from harness.efficiency.arithmetic import PERIOD
from harness.efficiency.budget import BUDGET_S, Budget
from harness.efficiency.forecasts import fill_forecasts
from harness.efficiency.plan import Entry, Group, every_group, plan, select
from harness.efficiency.process import Worker
from harness.efficiency.session import Outcome, measure_all
from harness.efficiency.store import Asked, Store
from harness.errors import UserError
from harness.measuring.gpu import NoGpuError, lease_for
from harness.progress import say
from harness.records import atomic
from harness.step.spec import EfficiencyStudy

Report = Callable[[], str]
"""Makes tables and figures of what is on disk, and says what it made."""


def measure(args: argparse.Namespace, study: EfficiencyStudy, store: Store, report: Report) -> int:
    """Measure what the budget allows, fill in forecasts with what is left of it, report; 1 after an error."""
    budget = Budget(BUDGET_S if args.budget is None else args.budget)
    groups = plan(study, args.device, args.only)
    asked = Asked(device=args.device, warmup_steps=args.warmup, timed_steps=args.steps, repeats=args.repeats)
    outcome = Outcome()
    if budget.left() > 0:
        try:
            with lease_for(args.device), Worker(args.device) as worker:
                outcome = measure_all(groups, asked, store, budget, worker)
        except NoGpuError as error:
            raise UserError(
                f"{error}; or forecast (--forecast), or rehearse on the tiny model (--device cpu)"
            ) from error
        seen = [entry for entry in _entries(groups) if store.current(entry, asked) is not None]
        outcome.errors += fill_forecasts(seen, store, budget, cores=args.cores)
        for entry in seen:
            store.predict(entry, asked)
    made = report()
    atomic.write_json(store.folder / "coverage.json", _coverage(args, budget, outcome))
    _say_end(store, outcome, budget, made)
    return 1 if outcome.errors else 0


def forecast(args: argparse.Namespace, study: EfficiencyStudy, store: Store, report: Report) -> int:
    """Forecast every cell that is not on disk yet, report; 1 after an error."""
    budget = Budget(args.budget)
    entries = _entries(select(every_group(study), args.only))
    failed = fill_forecasts(entries, store, budget, cores=args.cores)
    made = report()
    known = sum(map(store.has_fresh_forecast, entries))
    say(f"{known} of {len(entries)} cells have a forecast; {made}; all in {store.folder}")
    for line in failed:
        say(f"error: {line}")
    return 1 if failed else 0


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot be carried out, before anything is begun.

    Raises:
        UserError: the first of them.
    """
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


def _entries(groups: Sequence[Group]) -> list[Entry]:
    return [entry for group in groups for entry in group.entries]


def _coverage(args: argparse.Namespace, budget: Budget, outcome: Outcome) -> dict[str, Any]:
    return {
        "device": args.device,
        "device_name": outcome.device,
        "budget_s": budget.seconds,
        "spent_s": round(budget.spent(), 1),
        "repeats": args.repeats,
        "timed_steps": args.steps,
        "warmup_steps": args.warmup,
        "only": args.only,
        "blocks_measured": outcome.measured,
        "blocks_kept": outcome.kept,
        "not_measured": [
            {"cell": unit.entry.words, "block": unit.do, "repeat": unit.repeat, "why": why}
            for unit, why in outcome.missing
        ],
        "errors": outcome.errors,
    }


def _say_end(store: Store, outcome: Outcome, budget: Budget, made: str) -> None:
    say(
        f"{outcome.measured} blocks measured in {budget.spent():.0f} s, {outcome.kept} needed none, "
        f"{len(outcome.missing)} not measured; {made}; all in {store.folder}"
    )
    missing: dict[str, list[str]] = {}
    for unit, _ in outcome.missing:
        named = unit.entry.named
        missing.setdefault(f"{named.model}/{named.settings}/{named.shape}", []).append(named.label)
    for group, labels in missing.items():
        say(f"  not measured: {group}: {', '.join(dict.fromkeys(labels))}")
    for line in outcome.errors:
        say(f"  error: {line}")
