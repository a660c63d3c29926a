"""One self-contained html page per study, from the written tables and figures."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from harness.errors import UserError
from harness.records.atomic import sha256, write_text
from harness.records.columns import FRAMES
from harness.records.reading import read
from harness.reporting.answer import answer
from harness.reporting.frames import Frames
from harness.reporting.in_short import in_short
from harness.reporting.layout import SUBJECT, trained, why
from harness.reporting.page_parts import Figures, PageTables
from harness.reporting.score_tables import MEASURES
from harness.reporting.table import signed
from harness.study.last_words import FAILED, NOT_RUN
from harness.study.spec import Study
from harness.study.views import FigureKind

SVG_LIMIT_BYTES = 300_000
PACKAGES = ("pandas", "numpy", "scipy", "matplotlib")


def write_page(frames: Frames, study: Study, folder: Path, out: Path) -> None:
    """Write the page.

    Args:
        frames: the study's tables.
        study: its config.
        folder: holds the parquet files, `tables/` and `figures/`.
        out: the html file. What it says first is beside it as plain text, with the suffix `.txt`.

    Raises:
        UserError: tables or figures have not been made.
    """
    tables = read(folder / "tables" / "tables.json", PageTables).root
    captions = read(folder / "figures.json", Figures).root
    figures = [
        {"name": name, "source": _embed(folder / "figures", name), "caption": texts.caption, "alt": texts.alt}
        for name, texts in captions.items()
    ]
    verdicts = {
        measure: verdict_sentences(folder / "tables" / f"difference_{measure.name}.csv")
        for measure in MEASURES
        if f"difference_{measure.name}" in tables
    }
    environment = Environment(
        loader=PackageLoader("harness.reporting", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    answered = answer(frames, study)
    compared = {measure: folder / "tables" / f"difference_{measure.name}.csv" for measure in verdicts}
    short = in_short(frames, compared, answered=None if answered is None else answered.short)
    text = environment.get_template("page.html.j2").render(
        study=study,
        answer=answered,
        short=short,
        status=status_summary(frames),
        reasons=outcome_reasons(frames),
        flags=flagged_runs(frames),
        tables={name: table.rendered() for name, table in tables.items()},
        verdicts=verdicts if any(verdicts.values()) else {},
        trains=trained(study),
        figures={kind: [f for f in figures if str(f["name"]).startswith(kind)] for kind in _KINDS},
        compared={label: [f for f in figures if str(f["name"]).endswith(f"--{label}")] for label in study.comparisons},
        methods=_methods(study),
        recipe=study.recipe.model_dump(mode="json"),
        task_recipes={task: entry.recipe for task, entry in study.tasks.items() if entry.recipe},
        provenance=_provenance(frames, folder),
    )
    write_text(out.with_suffix(".txt"), "".join(f"- {line}\n" for line in short))
    write_text(out, text)


_KINDS = tuple(f"{kind}--" for kind in get_args(FigureKind))


def status_summary(frames: Frames) -> str:
    """How many runs are ok and how many ended otherwise, as part of a sentence."""
    counted = Counter(map(str, frames.runs["status"]))
    ok = counted.pop("ok", 0)
    rest = ", ".join(f"{n} {status}" for status, n in sorted(counted.items()))
    return f"{ok} of {len(frames.runs)} runs are ok" + (f"; {rest}" if rest else "")


def outcome_reasons(frames: Frames) -> list[str]:
    """The runs that do not count, with their reasons; seeds that share one reason share a line."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for row in frames.runs[frames.runs["status"] != "ok"].sort_values(["run", "seed"]).to_dict("records"):
        reason = why(row["status_why"], row["failed_checks"])
        key = (f"{row['method']} on {row['model']}, {row['task']}", f"{row['status']} — {reason}")
        seeds.setdefault(key, []).append(str(row["seed"]))
    return [
        f"{where}, seed{'s' * (len(which) > 1)} {', '.join(which)}: {what}" for (where, what), which in seeds.items()
    ]


def flagged_runs(frames: Frames) -> list[str]:
    """What the harness noted about runs that count; seeds that share a note share a line."""
    seeds: dict[tuple[str, str], list[str]] = {}
    collapsed = _collapsed(frames)
    for row in frames.ok_runs().sort_values(["method", "model", "task", "seed"]).to_dict("records"):
        where = f"{row['method']} on {row['model']}, {row['task']}"
        notes = [row["notes"]] if isinstance(row["notes"], str) and row["notes"] else []
        for note in filter(None, [*notes, collapsed.get(str(row["run"]))]):
            seeds.setdefault((where, note), []).append(str(row["seed"]))
    return [
        f"{where}, seed{'s' * (len(which) > 1)} {', '.join(which)}: {note}" for (where, note), which in seeds.items()
    ]


def _collapsed(frames: Frames) -> dict[str, str]:
    """A note, by run, on a sampler that nearly always draws the same layers; the probe alone does not show it."""
    known = frames.believed.dropna(subset=["probability"])
    at = [known["run"], known["step"]]
    p = known["probability"].astype("float64")
    share = p / p.groupby(at).transform("sum")
    entropy = (-share * np.log(share.where(share > 0, 1.0))).groupby(at).sum()
    by_step = pd.DataFrame({"effective": np.exp(entropy), "layers": p.groupby(at).size()})
    by_step["active"] = known["active"].astype("int64").groupby(at).sum()
    by_run = by_step.groupby(level="run").agg({"effective": "min", "layers": "max", "active": "max"})
    few = by_run[(by_run["active"] < by_run["layers"]) & (by_run["effective"] < by_run["active"] + 1)]
    return {
        str(run): f"the sampler collapsed: under {active + 1} effective layers at some refresh, {active} active"
        for run, active in few["active"].items()
    }


def verdict_sentences(csv: Path) -> list[str]:
    """The table of paired differences in plain words, one sentence a suite."""
    if csv.stat().st_size <= 1:  # nothing to compare: a csv without columns
        return []
    groups = pd.read_csv(csv).groupby(["model", "task", "suite"], sort=False)
    return [
        f"{task} / {suite} ({model}): {_sentence(rows.to_dict('records'))}" for (model, task, suite), rows in groups
    ]


def _sentence(rows: list[dict[Any, Any]]) -> str:
    found: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for row in rows:
        accuracy = "difference_share" in row
        value, verdict = row["difference_share" if accuracy else "difference_nats_per_token"], str(row["verdict"])
        size = "" if pd.isna(value) else f"{signed(100 * value, 1)} points" if accuracy else f"{signed(value, 4)} nats"
        if verdict in {"higher", "lower"}:
            better = (verdict == "higher") == accuracy
            found["better" if better else "worse"].append(f"{row['rival']} ({size})")
        else:
            reason = verdict.removeprefix("no claim (").removesuffix(")")
            found["open"].append(f"{row['rival']} ({'; '.join(filter(None, [size, reason]))})")
    parts = [f"{SUBJECT} is {word} than {', '.join(found[word])}" for word in ("better", "worse") if found[word]]
    if found["open"]:
        parts.append(f"no claim against {', '.join(found['open'])}")
    return "; ".join(parts) + "."


def _embed(folder: Path, name: str) -> str:
    """A data URI: the svg, or the png where the svg would make the page heavy.

    Raises:
        UserError: there is no such picture in the folder itself.
    """
    svg, png = folder / f"{name}.svg", folder / f"{name}.png"
    light = svg.is_file() and svg.stat().st_size <= SVG_LIMIT_BYTES
    chosen, kind = (svg, "svg+xml") if light else (png, "png")
    if Path(name).name != name or folder.is_symlink() or chosen.is_symlink() or not chosen.is_file():
        raise UserError(f"{folder.with_suffix('.json')}: no picture {name} lies in {folder}; draw the figures again")
    return f"data:image/{kind};base64,{base64.b64encode(chosen.read_bytes()).decode('ascii')}"


def _methods(study: Study) -> list[dict[str, str]]:
    return [
        {
            "label": label,
            "module": entry.module,
            "options": ", ".join(f"{k} = {json.dumps(v)}" for k, v in entry.options.items()) or "the method's defaults",
            "changes": ", ".join(f"{k} = {json.dumps(v)}" for k, v in entry.recipe.items()) or "none",
            "rate": "none, nothing is trained"
            if label not in trained(study)
            else "searched"
            if entry.lr is None
            else f"{entry.lr:g}, given by the config",
            "note": entry.note,
        }
        for label, entry in study.methods.items()
    ]


def _provenance(frames: Frames, folder: Path) -> dict[str, str]:
    runs = frames.runs
    made = runs[~runs["status"].isin([FAILED, NOT_RUN])]
    stale = int(runs["stale"].fillna(False).sum())
    paths = [folder / f"{name}.parquet" for name in FRAMES]
    files = {path.name: sha256(path)[:16] for path in paths if path.exists()}
    names = hashlib.sha256("\n".join(sorted(map(str, runs["run"]))).encode()).hexdigest()[:16]
    commits = sorted(set(runs["git_commit"].dropna()))
    return {
        "git commits of the runs": ", ".join(c[:12] for c in commits) or "unknown",
        "machines": "; ".join(sorted({f"{p}, {d}" for p, d in zip(made["platform"], made["device"], strict=True)})),
        "runs made by code that has changed since": f"{stale} of {len(runs)}",
        "sha256 over the run names": names,
        "sha256 of the tables": ", ".join(f"{name} {digest}" for name, digest in files.items()),
        "this page was made with": ", ".join(
            [f"python {platform.python_version()}", *(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)]
        ),
        "versions used in training": "in each run's train.json",
    }
