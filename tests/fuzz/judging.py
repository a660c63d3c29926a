"""What a call on a changed file came to, and whether that is one of the ends it may have."""

from __future__ import annotations

import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import LONGEST, UserError, letters
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.kinds import Kind

SECONDS = 20
"""Of processor time for one file; what is not done by then hangs."""


class Hangs(BaseException):
    """The time is up."""


@contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    """Raise `Hangs` in the block once it has used so much processor time; other load on the machine does not count."""

    def up(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGVTALRM, up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@dataclass
class Tally:
    """Counts of one kind, and an example of everything that may not be."""

    ends: Counter[str] = field(default_factory=Counter)
    foreign: dict[str, str] = field(default_factory=dict)

    def add(self, end: str, detail: str = "") -> None:
        self.ends[end] += 1
        if end == "foreign":
            self.foreign.setdefault(detail.partition(": ")[0], detail)


def end_of(use: Callable[[Path], object], path: Path) -> tuple[str, str]:
    """(valid, one sentence or foreign; what is foreign about it)."""
    beside = {*path.parent.parent.rglob("*")}
    try:
        with time_limit():
            use(path)
    except UserError as error:
        text = str(error)
        faults = {
            "two lines": len(text.splitlines()) != 1,
            "long": letters(text) >= LONGEST or len(text) >= 4 * LONGEST,
            "no file": path.name not in text,
            "of pydantic": "validation error" in text or "pydantic" in text,
            "unprintable": not text.isprintable(),
        }
        named = [fault for fault, there in faults.items() if there]
        return ("foreign", f"{', '.join(named)}: {len(text)} {text[:1000]}") if named else ("one sentence", text)
    except Hangs:
        return "foreign", "hangs: "
    except Exception as error:  # noqa: BLE001  every kind of exception is to be counted
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "harness" in f.filename][-1:]
        where = f"{Path(frame.filename).name} {frame.lineno} by {[(Path(f.filename).name, f.lineno) for f in ours]}"
        return "foreign", f"{type(error).__name__} in {where}: {str(error)[:300]}"
    if new := {*path.parent.parent.rglob("*")} - beside:
        return "foreign", f"writes: {sorted(map(str, new))[:3]}"
    return "valid", ""


def fuzzed(kind: Kind, examples: int, *, start: int = 0) -> Tally:
    """Ends of so many changed files; one `start` gives the same files every time."""
    tally = Tally()
    here = Path.cwd()

    @seed(start)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(content=kind.contents)
    def one(content: bytes) -> None:
        path = Path(folder) / "in" / kind.file
        path.write_bytes(content)
        end, detail = end_of(kind.use, path)
        if (Path(folder) / "RAN").exists() or (here / "RAN").exists():
            end, detail = "foreign", "runs code: "
        tally.add(end, f"{detail}\n{content[:200]!r}")

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in").mkdir()
        one()
    return tally
