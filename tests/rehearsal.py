"""The paper's study from prefetch to page on stand-ins, on a machine without its models, its GPU and a hub.

    python -m tests.rehearsal --mirror <folder> --folder <folder> [--study config/paper.yaml]

`--mirror` holds two real models as `../shared/reference/real-models.md` makes them: their tokenizers stand in for
Llama's and Gemma's. The configurations are the published ones, by their sizes in config/efficiency.yaml. The data are
the real files, as far as `../shared/data` has them; the two training sets are joined from the parts that it has.
`python -m harness rehearse` makes the study small, and Snakemake runs it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT)]

from harness.study.strict_yaml import read_yaml  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
ADAPTERS = DATA / "llm-adapters" / "dataset"
TOKENIZERS = {"llama": "HuggingFaceTB/SmolLM2-135M-Instruct", "gemma": "google/gemma-3-270m"}
MODELS = {
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": "tinyllama-1.1b",
    "google/gemma-2b": "gemma-2b",
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
}
"""Repository: the model's label in config/efficiency.yaml."""
PARTS = ("boolq", "piqa", "social_i_qa", "ARC-Easy", "ARC-Challenge", "openbookqa")


def write_mirror(mirror: Path, target: Path) -> None:
    """Folders with a published configuration and a real tokenizer; without weights, which a rehearsal does not read."""
    shapes = read_yaml(ROOT / "config" / "efficiency.yaml").value["models"]
    for repo, label in MODELS.items():
        shape = dict(shapes[label])
        shape.pop("parameters")
        family = shape.pop("architecture")
        source, folder = mirror / TOKENIZERS[family], target / repo
        folder.mkdir(parents=True)
        for path in source.glob("*token*"):
            shutil.copyfile(path, folder / path.name)
        ids = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config = {
            "architectures": [{"llama": "LlamaForCausalLM", "gemma": "GemmaForCausalLM"}[family]],
            "model_type": family,
            **shape,
            **{name: ids[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def write_data(target: Path) -> None:
    """What LLM-Adapters' clone would hold, of the real files that are here."""
    sets = target / "dataset"
    sets.mkdir(parents=True)
    for folder in ADAPTERS.iterdir():
        (sets / folder.name).symlink_to(folder)
    (sets / "hellaswag").mkdir()
    (sets / "hellaswag" / "test.json").symlink_to(DATA / "derived" / "hellaswag" / "test_olmes1k.json")
    (target / "ft-training_set").mkdir()
    worked = [json.loads(line) for line in (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    arithmetic = [{"instruction": row["question"], "input": "", "output": row["answer"]} for row in worked]
    arithmetic = [row | {"answer": row["output"].rsplit("####", 1)[-1].strip()} for row in arithmetic]
    choices: list[dict[str, Any]] = []
    for name in PARTS:
        file = ADAPTERS / name / "train.json"
        choices += json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    with gzip.open(DATA / "derived" / "winogrande" / "train_xl.json.gz", "rt", encoding="utf-8") as packed:
        choices += json.load(packed)
    for name, rows in (("math_10k", arithmetic), ("commonsense_170k", choices)):
        (target / "ft-training_set" / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")


def main() -> int:
    """Run it; returns Snakemake's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirror", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder, or that of an earlier start")
    parser.add_argument("--study", type=Path, default=ROOT / "config" / "paper.yaml")
    parser.add_argument("--cores", default="2")
    given, rest = parser.parse_known_args()
    folder = given.folder.absolute()
    if not folder.exists():
        write_mirror(given.mirror, folder / "published")
        write_data(folder / "data")
        (folder / "config").symlink_to(ROOT / "config")  # a study's paths count from the folder one starts in
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'workflow'}:{ROOT}",
        "MIRROR": str(folder / "published"),
        "GRASS_DATA": str(folder / "data"),
    }
    small = folder / "rehearsal"
    run = {"cwd": ROOT, "env": environment}
    subprocess.run(
        [sys.executable, "-m", "harness", "rehearse", "--config", str(given.study), "--out", str(small), *rest],
        check=True, **run,
    )  # fmt: skip
    (study,) = small.glob("*.yaml")
    environment.pop("MIRROR")
    sittings = folder / "sittings.json"
    before = json.loads(sittings.read_text(encoding="utf-8")) if sittings.is_file() else []
    # until this sitting ends, and for ever if it is killed, nobody knows how long it took
    sittings.write_text(json.dumps([*before, None]), encoding="utf-8")
    started = time.monotonic()
    code = subprocess.run(
        [
            sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(folder),
            "--cores", given.cores, "--keep-going", "--quiet", "progress", "rules", "host",
            "--config", f"STUDY={study}", f"MIRROR={small / 'mirror'}", f"GRASS_DATA={folder / 'data'}",
        ],
        **run,
    ).returncode  # fmt: skip
    minutes: list[float | None] = [*before, round((time.monotonic() - started) / 60, 1)]
    sittings.write_text(json.dumps(minutes), encoding="utf-8")
    print(f"rc {code} after {minutes[-1]} minutes")
    if code == 0:
        text = report(folder / "results" / study.stem, minutes=minutes, cores=given.cores)
        (folder / "rehearsal.md").write_text(text, encoding="utf-8")
        print(text)
    return code


def report(made: Path, *, minutes: list[float | None], cores: str) -> str:
    """What came of it, as a page: rows by outcome, reasons of those that are not ok, what was written."""
    import pandas as pd

    runs = pd.read_parquet(made / "runs.parquet")
    tables = sorted(path.stem for path in (made / "tables").glob("*.md"))
    figures = sorted(path.stem for path in (made / "figures").glob("*.svg"))
    record = next(iter(sorted((made.parent / "runs").glob("*/train.json"))))
    commit = json.loads(record.read_text(encoding="utf-8"))["provenance"]["git_commit"]
    broken = minutes.count(None)
    counted = runs.groupby(["model", "task", "status"]).size().reset_index(name="runs")
    strange = runs[runs["status"] != "ok"].groupby(["method", "status", "status_why"], dropna=False).size()
    scores = pd.read_parquet(made / "scores.parquet")
    lines = [
        f"# Rehearsal of {made.name.removesuffix('-rehearsal')}",
        "",
        f"Made by `python -m tests.rehearsal` at {f'commit {commit[:7]}' if commit else 'no commit'} on {cores} cores "
        f"without a GPU and a hub, in {' + '.join(str(m) for m in minutes if m is not None)} minutes "
        f"{f'and {broken} sittings that were broken off, ' * bool(broken)}from prefetch to page. Models are random, of "
        "at most 6 layers: no number here says anything about a method.",
        "",
        f"- {len(runs)} runs, {scores['run'].nunique()} scored, {len(scores)} scores of suites",
        f"- {len(tables)} tables: {', '.join(tables)}",
        f"- {len(figures)} figures: {', '.join(figures)}",
        "",
        "| model | task | outcome | runs |",
        "| --- | --- | --- | --- |",
        *(f"| {row.model} | {row.task} | {row.status} | {row.runs} |" for row in counted.itertuples()),
        "",
        "## Rows that are not ok",
        "",
        *(f"- {method}: {status}, {n} runs: {why}" for (method, status, why), n in strange.items()),
        *(["None."] if strange.empty else []),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
