"""What a study of many finished runs costs: `python -m tests.many_runs [--runs 500 2000 10000] [--out FILE]`.

A study of 2 models, 5 tasks and 5 methods with a learning-rate search each is written with as many seeds as give the
number of runs, and every job gets a record that the models of `harness.records` made. Each stage then runs in a
process of its own, as a user starts it. Shown are processor seconds and peak resident memory, and their growth from one
number of runs to the next. The 10,000 take tens of minutes; the files lie below the temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from harness.progress import STUDY_FILE
from harness.records.atomic import sealed
from harness.records.code import Roots
from harness.records.columns import DOCUMENT_COLUMNS
from harness.records.held import hashes
from harness.records.inputs import ModelRecord, OverlapRecord, RowsRecord, SuiteOverlap
from harness.records.measured import Memory, Timing
from harness.records.provenance import provenance
from harness.records.record import Provenance
from harness.records.run import DataUse, EvalRecord, SearchRecord, SuiteScore, TrainRecord, Trial
from harness.study import progress
from harness.study.config import load_study
from harness.study.jobs import EVALUATE, MODEL, OVERLAP, ROWS, SEARCH, SUITE, TRAIN, Job, Kind, RunJob, SearchJob
from harness.study.paths import Paths
from harness.study.plan import Plan, resolve_study

ROOT = Path(__file__).resolve().parents[1]
MODELS, TASKS, LAYERS, STEPS, DOCUMENTS = 2, 5, 8, 20, 20
METHODS = ("full", "lora", "lisa", "grass", "grass-static")
SEARCH_SEED = 1_000_000
CELLS = MODELS * TASKS * len(METHODS)
STAGE = "{python} -m harness {stage} --config mine.yaml"
STAGES = {
    "first start": '{python} -c "from pathlib import Path; from harness.study.plan import open_study; '
    "from harness.study.paths import Paths; open_study(Path('mine.yaml'), Paths(Path('fresh')))\"",
    "plan": STAGE.format(python="{python}", stage="plan"),
    "dry run": "{python} -m snakemake -s {root}/Snakefile --workflow-profile {root}/profiles/default "
    "--cores 2 --config STUDY=mine.yaml -n --quiet",
    "collect": STAGE.format(python="{python}", stage="collect") + " --out results/mine",
    "tables": STAGE.format(python="{python}", stage="tables") + " --frames results/mine --out results/mine/tables",
    "figures": STAGE.format(python="{python}", stage="figures") + " --frames results/mine --out results/mine/figures",
    "page": STAGE.format(python="{python}", stage="page") + " --frames results/mine --out results/mine/report.html",
    "progress line": "{python} -c \"from harness.study.progress import announce; announce('train')\"",
}
"""What is measured, each in its own process; `page` needs what the stages before it wrote."""
GOAL = ("plan", "dry run", "collect", "page")
"""Together below 60 processor seconds and each below 1.5 GiB at 10,000 runs."""


def study(runs: int) -> dict[str, Any]:
    """The embedded study's shape with other models, tasks and seeds."""
    body = yaml.safe_load((ROOT / "config" / "embedded.yaml").read_text(encoding="utf-8"))
    tiny, task = body["models"]["tiny"], body["tasks"]["arithmetic"]
    body |= {
        "study": "mine",
        "seeds": list(range(runs // CELLS)),
        "models": {f"tiny{n}": tiny | {"seed": n} for n in range(MODELS)},
        "tasks": {f"sums{n}": task | {"train": task["train"] | {"seed": n}} for n in range(TASKS)},
        "methods": {label: body["methods"][label] for label in METHODS},
    }
    body["search"] |= {"seeds": [SEARCH_SEED]}
    body["recipe"] |= {"steps": STEPS, "warmup_steps": 2}
    return body


def finish(plan: Plan, paths: Paths) -> None:
    """Give every job of the study a record, each after those that it is made from."""
    rng = np.random.default_rng(0)
    for kind in (MODEL, ROWS, SUITE):
        for name, job in plan.jobs(kind).items():
            if kind is MODEL:
                made: Any = ModelRecord(
                    name=name, folder=f"absent/{name}", files_sha256={}, parameters=1, wall_s=1.0,
                    provenance=made_by(kind, job),
                )  # fmt: skip
            else:
                made = RowsRecord(name=name, files_sha256={}, rows={"train": 4000}, provenance=made_by(kind, job))
            put(paths.output(kind, name), made)
    for name, overlap in plan.overlaps.items():
        nothing = [
            SuiteOverlap(suite=suite.label, items=DOCUMENTS, exact=[], masked=[], ngram=[]) for suite in overlap.suites
        ]
        counted = OverlapRecord(
            name=name, task=overlap.rows.label, train_rows=4000, suites=nothing, provenance=made_by(OVERLAP, overlap)
        )
        put(paths.output(OVERLAP, name), counted)
    for name, search in plan.searches.items():
        put(paths.output(SEARCH, name), _search(name, search))
    for name, job in plan.runs.items():
        _course(paths.run(name), job, rng)
        put(paths.output(TRAIN, name), _run(name, job, paths.run(name)))
        evaluation = plan.evaluation_of[name]
        suites = [suite.label for suite in plan.evals[evaluation].all_suites]
        _score(paths.score(name, evaluation), name, evaluation, suites, rng)


def put(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(sealed(record.model_dump_json(indent=2)), encoding="utf-8")


def made_by(kind: Kind[Any], job: Job) -> Provenance:
    return _provenance(kind.roots(job))


@cache
def _provenance(roots: Roots) -> Provenance:
    return provenance(roots=roots, inputs={})


def _search(name: str, job: SearchJob) -> SearchRecord:
    t = job.training
    trials = [
        Trial(lr=lr, seed=SEARCH_SEED, status="ok", validation_loss=0.5 + lr, extension=False) for lr in job.search.grid
    ]
    return SearchRecord(
        name=name, model=t.model.label, task=t.rows.label, method=t.label, lr=job.search.grid[0], at_edge=True,
        trials=trials,
        wall_s=9.0, provenance=made_by(SEARCH, job),
    )  # fmt: skip


def _run(name: str, job: RunJob, folder: Path) -> TrainRecord:
    t = job.training
    return TrainRecord(
        name=name, status="ok", model=t.model.label, task=t.rows.label, method=t.label, module=t.module,
        options=t.options, seed=job.seed, recipe=t.recipe.model_dump(mode="json"), recipe_changes=[], lr=1e-3,
        lr_searched=True, steps_done=STEPS, checkpoint=None, checkpoint_why="not kept", parameters=442_176,
        trainable_parameters=200_000, train_loss=0.4, validation_loss=0.45 + 0.001 * job.seed, clipped_share=0.1,
        data=DataUse(train_rows=4000, truncated_rows=0, dropped_rows=0, mean_tokens=30.0, answer_tokens_share=0.4),
        timing=Timing(
            load_s=1.0, prepare_s=0.5, train_s=20.0, warmup_steps=2, timed_steps=18, step_median_s=0.05,
            step_p95_s=0.06, throughput_tokens_per_s=5000.0, throughput_total_tokens_per_s=5500.0,
            clock="perf_counter", device_synchronised=False,
        ),
        memory=Memory(
            host_peak_bytes={"load": 400_000_000, "steady": 500_000_000 + job.seed}, device_allocated_peak_bytes={},
            device_reserved_peak_bytes={}, device_why="the run was on the CPU", nvml_process_peak_bytes=None,
            nvml_device_peak_bytes=None, nvml_why="no NVIDIA driver", state_peak_bytes=3_000_000 + job.seed,
        ),
        files_sha256=hashes(folder, folder.glob("*.jsonl")), provenance=made_by(TRAIN, job),
    )  # fmt: skip


def _course(folder: Path, job: RunJob, rng: np.random.Generator) -> None:
    """The files by step, of a short run: their length grows with the steps, not with the number of runs."""
    losses, norms = 2 - np.arange(STEPS) / STEPS + 0.05 * rng.random(STEPS), 1e-4 * (1 + rng.random(LAYERS))
    steps = (
        {"step": t, "loss": float(losses[t]), "lr_factor": 1.0, "grad_norm": 1.1, "clipped": False, "tokens": 480,
         "total_tokens": 520, "step_s": 0.05}
        for t in range(STEPS)
    )  # fmt: skip
    _jsonl(folder / "steps.jsonl", steps)
    at = range(0, STEPS + 1, STEPS // 2)
    seen = ({"step": t, "gradient_rms": norms.tolist(), "validation_loss": float(losses.min())} for t in at)
    _jsonl(folder / "observed.jsonl", seen)
    if job.training.module == "grass":
        share = (norms / norms.sum()).tolist()
        belief = (
            {"step": t, "active": [0, 1], "importance": norms.tolist(), "probability": share, "age_steps": None,
             "temperature": 1.0}
            for t in at
        )  # fmt: skip
        _jsonl(folder / "believed.jsonl", belief)


def _jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _score(path: Path, run: str, name: str, suites: list[str], rng: np.random.Generator) -> None:
    tables, scores = [], []
    for suite in suites:
        right = rng.random(DOCUMENTS) < 0.5
        table = pd.DataFrame(
            {"run": run, "suite": suite, "document": range(DOCUMENTS), "correct": right, "correct_normalised": None,
             "parsed": True, "prediction": "7", "gold": "7", "loss": rng.random(DOCUMENTS), "tokens": 5}
        )  # fmt: skip
        tables.append(table.astype(DOCUMENT_COLUMNS))
        scores.append(
            SuiteScore(
                suite=suite, scoring="number", protocol="llm-adapters", rows=DOCUMENTS, correct=int(right.sum()),
                unparsed=0, chance=None, heldout_loss=float(table["loss"].mean()), heldout_tokens=5 * DOCUMENTS,
                truncated_rows=0, leaked_rows=0,
                limited=False,
            )
        )  # fmt: skip
    documents = path.with_suffix(".parquet")
    documents.parent.mkdir(parents=True, exist_ok=True)
    pd.concat(tables).to_parquet(documents, index=False)
    record = EvalRecord(
        name=name, run=run, status="ok", decoding={}, scores=scores, wall_s=1.0,
        files_sha256=hashes(path.parent, [documents]), provenance=_provenance(EVALUATE.roots(None)),
    )  # fmt: skip
    put(path, record)


def measured(folder: Path) -> dict[str, tuple[float, float]]:
    """Processor seconds and peak resident GiB of every stage in a folder with a finished study; NaN: it failed."""
    work = Path("results/logs/mine.work")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'workflow'}:{ROOT}", STUDY_FILE: "mine.yaml", progress.STUDY_WORK: str(work),
        progress.STUDY_STARTED: str(time.time()), progress.STUDY_DONE: "0",
    }  # fmt: skip
    found = {}
    for stage, command in STAGES.items():
        words = command.format(python=sys.executable, root=ROOT)
        with (folder / f"{stage.replace(' ', '-')}.log").open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {words}"], cwd=folder, env=environment, stdout=log, stderr=log
            )
            _, code, usage = os.wait4(process.pid, 0)
        found[stage] = (usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)
        said = f"{found[stage][0]:.1f} s, {found[stage][1]:.2f} GiB"
        print(f"  {stage}: {said}" + (f", FAILED, see {log.name}" if code else ""), file=sys.stderr, flush=True)
        if code:
            found[stage] = (float("nan"), float("nan"))
    return found


def table(results: dict[int, dict[str, tuple[float, float]]]) -> str:
    """Markdown: a row a stage, and a last one for the stages that the goal is about."""
    sizes = sorted(results)
    heads = [f"{n:,} runs (s, GiB)" for n in sizes] + [f"growth to {n:,}" for n in sizes[1:]]
    lines = [f"| stage | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    rows = {stage: [results[n][stage] for n in sizes] for stage in STAGES}
    rows[f"{', '.join(GOAL)}"] = [
        (sum(results[n][stage][0] for stage in GOAL), max(results[n][stage][1] for stage in GOAL)) for n in sizes
    ]
    for stage, values in rows.items():
        growth = [f"× {b[0] / a[0]:.1f}" for a, b in pairwise(values)]
        lines.append(f"| {stage} | {' | '.join([f'{s:.1f}, {gib:.2f}' for s, gib in values] + growth)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[500, 2000, 10000], help=f"multiples of {CELLS}")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    chosen = parser.parse_args()
    results = {}
    for runs in chosen.runs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            text = yaml.safe_dump(study(runs), sort_keys=False)
            # YAML 1.1 wants a dot in a number with an exponent
            (folder / "mine.yaml").write_text(re.sub(r"\b(\d+)e-", r"\1.0e-", text), encoding="utf-8")
            plan = resolve_study(load_study(folder / "mine.yaml"))
            print(f"{len(plan.runs)} runs", file=sys.stderr, flush=True)
            paths = Paths(folder / "results")
            finish(plan, paths)
            os.chdir(folder)
            progress.write_work(plan, Paths(), Path("results/logs/mine.work"))
            results[len(plan.runs)] = measured(folder)
            os.chdir(ROOT)
    said = table(results)
    print(said)
    if chosen.out:
        machine = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}"
        chosen.out.write_text(
            f"# Cost of a study by its number of finished runs\n\nMade by `python -m tests.many_runs` on {machine}: "
            f"processor seconds and peak resident memory of each stage in a process of its own.\n\n{said}",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
