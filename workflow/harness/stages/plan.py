"""`python -m harness plan`: list a study's jobs, which are done, stale or to do, and what they take on disk."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.study.paths import Paths
    from harness.study.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--config", type=Path, required=True, help="config/<study>.yaml")
    parser.add_argument("--all", action="store_true", help="also list inputs and searches, one a line")
    parser.add_argument("--cores", type=int, help="as for snakemake: what is to come depends on it; default: all here")


SHOWN = 12
"""Files named in the summary of what made records stale."""
SHOWN_CHARACTERS = 400
"""Of a task's prompt."""


def run(args: argparse.Namespace) -> int:
    """Print the table; nothing is written and nothing is computed."""
    from harness.records.reading import Stamp, read
    from harness.study.config import load_study
    from harness.study.identity import replaced_models
    from harness.study.jobs import EVALUATE, MODEL, PROBE, TRAIN
    from harness.study.paths import Paths
    from harness.study.plan import folder_bytes, model_of, outputs, resolve_study
    from harness.study.stale import changed_files, is_stale

    paths = Paths()
    plan = resolve_study(load_study(args.config, inputs_needed=False))
    study = plan.study
    print(
        f"{study.study}: {len(study.models)} models x {len(study.tasks)} tasks x {len(study.methods)} methods "
        f"= {len(plan.runs)} runs, {len(plan.searches)} searches"
    )
    replaced = replaced_models((paths.output(MODEL, name) for name in plan.models), dry_run=True)
    of_replaced = {manifest.parent.name for manifest in replaced}
    counts: dict[str, Counter[str]] = {}
    changed: Counter[str] = Counter()
    for output in outputs(plan, paths):
        state, detail = "to do", ""
        if output.path.exists():
            record = read(output.path, Stamp)
            state, detail = "done", record.status
            if is_stale(record.provenance, output):
                state = "stale"
                changed.update(changed_files(record.provenance, output))
            if model_of(plan, output) in of_replaced:
                state = "other"
        counts.setdefault(output.kind.name, Counter())[state] += 1
        if output.kind in (PROBE, TRAIN) or args.all:
            print(f"  {state:<6} {output.kind.name:<9}{detail:<11}{output.name}")
    print()
    for line in _prompts(plan, paths):
        print(f"  prompt   {line}")
    for kind, counter in counts.items():
        print(f"  {kind:<9}" + ", ".join(f"{number} {state}" for state, number in sorted(counter.items())))
    folders = {output.path.parent for output in outputs(plan, paths) if output.kind is not EVALUATE}
    print(f"  on disk  {folder_bytes(folders) / 2**20:.1f} MiB under {paths.root}/")
    for line in _to_come(plan, paths, cores=args.cores, config=args.config):
        print(f"  {line}")
    for message in replaced.values():
        print(f"  other: {message}")
    if changed:
        print(
            "  stale: made by other code than today's. It is kept; to make it anew: snakemake --cores 1 --config "
            f"{shlex.quote(f'STUDY={args.config}')} --force <its file> (--all lists every job)"
        )
        print(f"  what differs, with the number of records: {_summary(changed)}")
    return 0


def _to_come(plan: Plan, paths: Paths, *, cores: int | None, config: Path) -> Iterator[str]:
    """Bytes and hours to come, and what stands in their way."""
    from harness.progress import duration
    from harness.records.units import gib
    from harness.study.disk import jobs_at_once, to_come, too_little
    from harness.study.hours import hours_to_come
    from harness.study.keep import gone, train_again

    jobs = jobs_at_once(plan, cores=cores)
    disk, hours = to_come(plan, paths, jobs=jobs), hours_to_come(plan, paths)
    parts = f" ({disk.parts()})" if disk.peak_bytes else ""
    yield f"to come  up to {gib(disk.peak_bytes, 1)} GiB of disk{parts}; {gib(disk.free_bytes, 1)} GiB are free"
    if hours.by_pace or hours.by_arithmetic:
        how = [
            f"{hours.by_pace} at the pace of finished ones" * bool(hours.by_pace),
            f"{hours.by_arithmetic} by arithmetic of usual machines: a guess, which finished runs will replace"
            * bool(hours.by_arithmetic),
        ]
        at_once = f", {duration(hours.seconds / jobs)} with {jobs} at once" if jobs > 1 else ""
        yield f"to come  {duration(hours.seconds)} of jobs{at_once} ({', '.join(filter(None, how))})"
    line = too_little(plan, paths, jobs=jobs)
    if line is not None:
        yield f"too little disk: snakemake will refuse: {line.partition(': too little disk: ')[2]}"
    lost = gone(plan, paths)
    if lost:
        yield (
            f"gone: {len(lost)} runs that are to be scored have no model any more (runtime.keep); they must train "
            f"again: {train_again(lost, paths, config=config)}"
        )


def _prompts(plan: Plan, paths: Paths) -> Iterator[str]:
    """Every task's prompt with its first row, or with the names of the fields while there are no rows yet.

    The text of a chat template is known once the model is here; `transformers` is imported for it alone.
    """
    from harness.inputs.prompts import Prompt, Row
    from harness.inputs.rows import read_rows
    from harness.records.inputs import ModelRecord
    from harness.records.reading import read
    from harness.study.jobs import MODEL

    for job in plan.rows.values():
        name = plan.study.tasks[job.label].prompt
        file = paths.rows(job.name) / "train.json"
        row = read_rows(file)[0] if file.is_file() else Row(instruction="{instruction}", input="", output="", answer="")
        if name != "chat":
            yield f"{job.label}: {name}, {_shown(Prompt(name, None).evaluation(row))}"
            continue
        for model in plan.models.values():
            manifest = paths.output(MODEL, model.name)
            if manifest.is_file():
                from harness.inputs.models import load_tokenizer
                from harness.study.paths import resolve

                prompt = Prompt(name, load_tokenizer(resolve(read(manifest, ModelRecord).folder)))
                yield f"{job.label}: {name}, {model.label}: {_shown(prompt.evaluation(row))}"
            else:
                yield f"{job.label}: {name}, {model.label}: its tokenizer's own template, shown once the model is here"


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ...")


def _summary(changed: Counter[str]) -> str:
    """The files that differ for most records, in one line."""
    named = [f"{name} ({number})" for name, number in changed.most_common(SHOWN)]
    more = len(changed) - len(named)
    return ", ".join(named) + (f", and {more} more files" if more else "")
