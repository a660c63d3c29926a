"""`python -m harness publish`: copy a finished study, or what is there of one, to results/published/."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from harness.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--config", type=Path, required=True, help="config/<study>.yaml")
    parser.add_argument(
        "--partial", action="store_true", help="of a study that is not finished: what `harness partial` made"
    )


def run(args: argparse.Namespace) -> int:
    """Copy; refuse a study that is not finished, and text that names a place on this machine."""
    from harness.records import atomic
    from harness.study.config import load_study
    from harness.study.paths import Paths
    from harness.study.plan import outputs, resolve_study

    paths = Paths()
    plan = resolve_study(load_study(args.config, inputs_needed=False))
    made = paths.study(plan.study.study) / ("partial" if args.partial else "")
    pairs = [(o.path, paths.spec(o.kind, o.job.name)) for o in outputs(plan, paths)]
    if args.partial:
        pairs = [(record, spec) for record, spec in pairs if record.exists()]
    records = {path for pair in pairs for path in pair}
    missing = [path for path in records if not path.exists()]
    if missing or not (made / "report.html").exists():
        more = ", or publish what `python -m harness partial` makes of it with --partial"
        raise UserError(
            f"{plan.study.study} is not finished ({len(missing)} records and specs missing): run it first"
            f"{'' if args.partial else more}"
        )
    target = paths.root / "published" / plan.study.study
    with atomic.whole_folder(target) as temporary:
        for path in sorted(made.iterdir()):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, temporary / path.name)
        for path in records:
            copy = temporary / "records" / path.relative_to(paths.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        (temporary / "figures" / ".snakemake_timestamp").unlink(missing_ok=True)
        (temporary / "tables" / ".snakemake_timestamp").unlink(missing_ok=True)
        shutil.copy(args.config, temporary / "study.yaml")
        _refuse_machine_paths(temporary)
    print(f"published: {target} ({len(pairs)} of {len(outputs(plan, paths))} records)")
    return 0


def _refuse_machine_paths(folder: Path) -> None:
    """A record that names this machine's folders says nothing to others, and too much."""
    folders = {str(Path.home()), str(Path.cwd())} - {"/"}
    for path in folder.rglob("*"):
        if path.suffix in {".json", ".jsonl", ".md", ".csv", ".tex", ".html", ".yaml", ".svg"}:
            text = path.read_text(encoding="utf-8")
            found = [name for name in folders if name in text]
            if found:
                raise UserError(
                    f"{path.relative_to(folder)} names {found[0]}: give paths through a variable and run again"
                )
