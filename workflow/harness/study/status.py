"""What a study's jobs do now, from what they leave on the disk: outputs, signs, locks and logs. Nothing is written or
locked, and every file may be half-written, damaged or gone the moment it is read. Imports no torch.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from pydantic import BaseModel

from harness.errors import UserError
from harness.records.locks import lock_of
from harness.records.reading import read
from harness.sign import sign_of
from harness.study.jobs import EVALUATE, MODEL, OVERLAP, PROBE, ROWS, SEARCH, SUITE, TRAIN
from harness.study.last_words import FAILED, log_of, reason, rule_of, status_of
from harness.study.paths import Paths
from harness.study.plan import Output, Plan, outputs

SILENT_S = 120.0
"""Age of a sign from which on it is said that there is none: loading and long steps take less, as a rule."""
_BORN_LATER_S = 2.0
"""A process that began later than this after a sign was written only has the number of the one that wrote it."""

STAGES = {"inputs": (MODEL, ROWS, SUITE, OVERLAP)}
"""Kinds that are counted together; others stand under their own name."""


class Sign(NamedTuple):
    """The sign of a job, or its lock where it has none yet."""

    facts: dict[str, Any]
    silent_s: float
    alive: bool | None
    """None: the process is another machine's, or unknown."""


@dataclass(frozen=True)
class Running:
    """A job without output that has a sign."""

    rule: str
    name: str
    sign: Sign


@dataclass(frozen=True)
class Row:
    """A job that failed, was stopped, or whose record is not `ok`."""

    rule: str
    name: str
    status: str
    why: str
    log: Path | None


@dataclass
class Status:
    """A study at one moment."""

    done: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)
    running: list[Running] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)
    stopped: list[Row] = field(default_factory=list)
    not_ok: list[Row] = field(default_factory=list)

    @property
    def all_done(self) -> bool:
        """Whether every job left its output."""
        return self.done == self.total


class _Ended(BaseModel):
    """What a record says of its end."""

    status: str = "ok"
    status_why: str | None = None


class Reader:
    """Reads a study again and again; a record is read once, since no job writes it a second time."""

    def __init__(self, plan: Plan, paths: Paths) -> None:
        self.paths = paths
        self._jobs = [(output, *rule_of(plan, output)) for output in outputs(plan, paths)]
        self._ended: dict[tuple[Path, int], _Ended] = {}

    def status(self) -> Status:
        """The study now."""
        found = Status()
        for output, rule, name in self._jobs:
            stage = _stage(output)
            found.total[stage] += 1
            if (ended := self._record(output)) is not None:
                found.done[stage] += 1
                if ended.status != "ok":
                    found.not_ok.append(Row(rule, name, ended.status, ended.status_why or "no reason given", None))
                continue
            sign = sign_now(output.path)
            if sign is not None and sign.alive is not False:
                found.running.append(Running(rule, name, sign))
            else:
                self._unfinished(found, output, rule, name, sign)
        return found

    def _unfinished(self, found: Status, output: Output, rule: str, name: str, sign: Sign | None) -> None:
        """A job without output and without a process."""
        log = log_of(self.paths, rule, name)
        try:
            why = reason(self.paths, rule, name) if sign is not None or log.is_file() else ""
        except OSError:
            why = ""
        if status_of(why) == FAILED:
            found.failed.append(Row(rule, name, FAILED, _words(why, log), log))
        elif sign is not None:
            last = doing(sign.facts)
            found.stopped.append(Row(rule, name, "killed", f"its process is gone; last sign: {last}", log))
        elif "stopped by SIG" in why:
            found.stopped.append(Row(rule, name, "stopped", _words(why, log), log))

    def _record(self, output: Output) -> _Ended | None:
        try:
            written = output.path.stat().st_mtime_ns
        except OSError:
            return None
        if output.kind not in (PROBE, SEARCH, TRAIN, EVALUATE):
            return _Ended()
        key = (output.path, written)
        if key not in self._ended:
            try:
                self._ended[key] = read(output.path, _Ended)
            except UserError as error:
                return _Ended(status="damaged", status_why=str(error))
        return self._ended[key]


def _stage(output: Output) -> str:
    return next((name for name, kinds in STAGES.items() if output.kind in kinds), output.kind.name)


def _words(why: str, log: Path) -> str:
    """The reason without the rule before it and the log behind it, which stand beside it."""
    return why.partition(": ")[2].removesuffix(f" ({log})")


# ------------------------------------------------------------ one job


def sign_now(output: Path) -> Sign | None:
    """The sign of the job that writes `output`; None where there is no such job."""
    for path in (sign_of(output), lock_of(output)):
        try:
            written, text = path.stat().st_mtime, path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        facts = _facts(text)
        return Sign(facts, max(0.0, time.time() - written), _alive(facts, written))
    return None


def _facts(text: str) -> dict[str, Any]:
    """What a sign says; nothing of one that is no JSON object."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _alive(facts: dict[str, Any], written: float) -> bool | None:
    """Whether the process that wrote a sign lives; None where this machine cannot know."""
    pid = facts.get("pid")
    if facts.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return None
    try:
        process = psutil.Process(pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= written + _BORN_LATER_S)
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):
        return None


def number(facts: dict[str, Any], key: str) -> float | None:
    """A finite number above 0 in a sign; None where it says none."""
    value = facts.get(key)
    return float(value) if isinstance(value, (int, float)) and 0 < value < float("inf") else None


_PHASES = {
    "load": "loading",
    "prepare": "preparing",
    "eval": "validating",
    "save": "exporting",
    "steps": "between steps",
}


def doing(facts: dict[str, Any]) -> str:
    """What a job does, in words: trial, phase, units done, last loss."""
    words = []
    if number(facts, "trial") and number(facts, "trials"):
        words.append(f"trial {facts['trial']} of {facts['trials']}")
    total = number(facts, "total")
    if total is not None:
        of, unit = f"{number(facts, 'done') or 0:.0f} of {total:.0f}", facts.get("unit", "step")
        # a scoring job's label ends in its suite
        words.append(
            f"{str(facts.get('label')).rpartition(' ')[2]}, answer {of}" if unit == "answer" else f"{unit} {of}"
        )
    elif phase := facts.get("phase"):
        words.append(_PHASES.get(str(phase), str(phase)))
    if not words:
        words.append("loading, or at work without steps")
    return ", ".join([*words, *([str(facts["note"])] if facts.get("note") else [])])


def seconds_left(facts: dict[str, Any]) -> float | None:
    """Time that the units of a job still take, a search's later trials too; None where its speed is not known yet.

    What comes before and after the units (loading, validation, export) is left out.
    """
    each, total = number(facts, "unit_s"), number(facts, "total")
    if each is None or total is None:
        return None
    more = (number(facts, "trials") or 0) - (number(facts, "trial") or 0)
    return each * (max(0.0, total - (number(facts, "done") or 0)) + max(0.0, more) * total)


# ------------------------------------------------------------ whoever starts the jobs


def snakemake_here(folder: Path) -> bool | None:
    """Whether a Snakemake works in this folder; None where this machine cannot know.

    Args:
        folder: `.snakemake`, whose lock stays when its holder ends (`harness.study.supervision.take_folder`).
    """
    lock = folder / "study.lock"
    try:
        written, text = lock.stat().st_mtime, lock.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False if os.path.isdir(folder) else None
    except OSError:
        return None
    return _alive(_facts(text), written)
