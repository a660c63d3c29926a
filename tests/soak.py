"""Kills studies at random moments, again and again, and compares what they end in with a study that was left alone.

    python -m tests.soak --kills 200 --folder <folder>

Every kill is followed by the README's command and nothing else. A signal (KILL, TERM, INT) goes to one job, to
Snakemake alone, or to every process, at a moment that the seed draws: while the study is planned, fetched, pretrained,
searched, trained, saved, scored, collected, or while tables, figures and page are made. Finished studies are noted in
the folder: the same command goes on. It takes about a quarter of a minute a kill on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "workflow"), str(ROOT)]

from harness.records.atomic import write_text  # noqa: E402
from kills import Kill, Who, differences  # noqa: E402

MOMENTS = {
    "plan": ".snakemake/log/*.log",
    "prefetch": "results/logs/prefetch_*/*.log",
    "pretrain": "results/state/mini--*/step*.json",
    "search": "results/state/*/lr*/step*.json",
    "save a state": "results/state/**/step*.pt",
    "train": "results/state/mini--arithmetic--*/step*.json",
    "export": "results/runs/*/.model.*.part",
    "evaluate": "results/logs/evaluate/*.log",
    "collect": "results/logs/collect/*.log",
    "tables": "results/logs/tables/*.log",
    "figures": "results/logs/figures/*.log",
    "page": "results/logs/page/*.log",
}
"""By phase, the file that shows that a study has come to it; in the order of the phases."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WHO: tuple[Who, ...] = ("job", "snakemake", "all")
KILLS_A_STUDY = 8
LONGEST_S = 1.0
"""Between the moment and the signal."""
IN_SAVING_S = 0.02
"""The same while a state is saved: its file is there, its manifest and the removal of the older one are to come."""
STARTS = 4
"""Of the command after the last kill, at most. One is enough; how many there were is counted."""
EQUAL_TABLES = ("accuracy", "heldout_loss", "learning_rates", "difference_accuracy", "importance_claims")
"""Tables without times."""


@dataclass(frozen=True)
class Study:
    """A working folder with the small study of the tests."""

    folder: Path

    def begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        shutil.copy(ROOT / "tests" / "pipeline" / "micro.yaml", self.folder / "micro.yaml")

    @property
    def command(self) -> list[str]:
        return [
            sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(self.folder),
            "--profile", str(ROOT / "profiles" / "default"), "--cores", "2", "--config", "STUDY=micro.yaml",
        ]  # fmt: skip

    def finish(self) -> int:
        """The README's command until the study is at its end.

        Returns:
            How often it was started.

        Raises:
            SystemExit: it does not come to its end; the message holds its last words.
        """
        for starts in range(1, STARTS + 1):
            done = subprocess.run(self.command, cwd=self.folder, capture_output=True, text=True)
            if done.returncode == 0:
                return starts
        raise SystemExit(f"{self.folder} does not come to its end:\n{(done.stdout + done.stderr)[-3000:]}")


def drawn(number: int, seed: int) -> list[tuple[str, Kill]]:
    """The kills of one study, in the order of their phases."""
    rng = random.Random(f"{seed} {number}")
    phases = sorted(rng.choices(list(MOMENTS), k=KILLS_A_STUDY), key=list(MOMENTS).index)
    # while it is planned there is no job
    whom = {phase: WHO[1:] if phase == "plan" else WHO for phase in phases}
    longest = {phase: IN_SAVING_S if phase == "save a state" else LONGEST_S for phase in phases}
    return [
        (phase, Kill(MOMENTS[phase], rng.choice(SIGNALS), rng.choice(whom[phase]), rng.random() * longest[phase]))
        for phase in phases
    ]


def soak(study: Study, straight: Study, kills: list[tuple[str, Kill]]) -> dict[str, Any]:
    """Kill one study as drawn and compare it; what was done and what differs."""
    study.begin()
    done = []
    for phase, kill in kills:
        took = kill.carry_out(study)
        if took is not None:
            done.append({"phase": phase, "signal": kill.number.name, "who": kill.who, "ended_s": round(took, 1)})
    starts = study.finish()
    results, wanted = study.folder / "results", straight.folder / "results"
    found = differences(wanted, results)
    for name in EQUAL_TABLES:
        file = Path("micro") / "tables" / f"{name}.csv"
        if (results / file).read_bytes() != (wanted / file).read_bytes():
            found.append(str(file))
    found += [f"left: {p.relative_to(results)}" for p in results.rglob(".*") if p.suffix in {".part", ".lock"}]
    return {"kills": done, "starts": starts, "differences": found}


def table(rows: list[dict[str, Any]], *, seed: int) -> str:
    """The result as markdown."""
    kills = [kill for row in rows for kill in row["kills"]]
    starts = max((row["starts"] for row in rows), default=0)
    equal = sum(not row["differences"] for row in rows)
    counted = Counter((kill["phase"], kill["signal"]) for kill in kills)
    names = [number.name for number in SIGNALS]
    told = [kill["ended_s"] for kill in kills if kill["signal"] == "SIGTERM" and kill["who"] != "job"]
    lines = [
        f"{len(kills)} kills (seed {seed}) in {len(rows)} studies of {KILLS_A_STUDY} drawn moments each; after each",
        f"the same command again. {equal} of {len(rows)} studies ended as the one that was left alone: every record,",
        f"log, weight and prediction, and the tables without times; starts after the last kill: {starts}. Kills by",
        "phase and signal:",
        "",
        f"| while | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
        *(f"| {phase} | {' | '.join(str(counted[phase, name]) for name in names)} |" for phase in MOMENTS),
        "",
        "Sent to "
        + ", ".join(f"{who}: {sum(kill['who'] == who for kill in kills)}" for who in WHO)
        + f". After a SIGTERM to Snakemake or to all, everything had ended within {max(told, default=0):.0f} s.",
    ]
    different = [name for row in rows for name in row["differences"]]
    return "\n".join([*lines, *(f"- differs: {name}" for name in different)]) + "\n"


def main() -> None:
    """Soak until there were enough kills, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="working folder, some 100 MB")
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    straight, log = Study(args.folder.absolute() / "straight"), args.folder / f"seed{args.seed}.jsonl"
    if not (straight.folder / "results" / "micro" / "report.html").is_file():
        straight.begin()
        straight.finish()
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    while sum(len(row["kills"]) for row in rows) < args.kills:
        began, study = time.monotonic(), Study(args.folder.absolute() / f"study{len(rows)}")
        rows.append(soak(study, straight, drawn(len(rows), args.seed)))
        with log.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        total = sum(len(row["kills"]) for row in rows)
        print(
            f"study {len(rows)}: {len(rows[-1]['kills'])} kills ({total} of {args.kills}), "
            f"{rows[-1]['differences'] or 'equal'}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True,
        )  # fmt: skip
        if not rows[-1]["differences"]:
            shutil.rmtree(study.folder)
    text = table(rows, seed=args.seed)
    print(text)
    if args.out is not None:
        write_text(args.out, text)
    sys.exit(any(row["differences"] for row in rows))


if __name__ == "__main__":
    main()
