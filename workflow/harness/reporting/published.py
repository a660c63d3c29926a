"""Published numbers: a strict file of results that others reported, and the table that compares ours with them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pandas import DataFrame
from pydantic import Field, model_validator

from baselines.method import Strict
from harness.records.units import GIB
from harness.reporting.frames import Frames
from harness.reporting.layout import of_method
from harness.reporting.quantities import values
from harness.reporting.stats import summarise
from harness.reporting.table import UNKNOWN, Footnotes, Table, number
from harness.study.labels import Label
from harness.study.strict_yaml import read_yaml, validate

Metric = Literal[
    "accuracy", "accuracy_sd", "accuracy_difference", "peak_memory", "extra_memory", "throughput_ratio",
    "overhead_share",
]  # fmt: skip
SAME_SIZE = 0.1
"""Share that a model's size may differ from the paper's: adapters and untied heads are in some counts."""
_UNITS = {"percent": ", %", "points": ", points", "GB": ", GB", "ratio": ""}


class Number(Strict):
    """One published figure. Properties that the source does not state are null."""

    table: str = Field(description="table, figure or section of the paper")
    model: Label | None
    task: Label | None = Field(description="our label of the training set; a memory run has a task of its own")
    suites: tuple[Label, ...] = Field(default=(), description="more than one: the plain mean over them")
    method: Label
    against: Label | None = Field(default=None, description="the other method of a difference or a ratio")
    metric: Metric
    unit: Literal["percent", "points", "GB", "ratio"]
    value: float
    bound: Literal["exact", "above"] = "exact"
    source: str = Field(description="letters of `sources`")
    status: Literal["FOUND"]
    tolerance: float = Field(ge=0, description="in `unit`; stated before anything was measured")
    tolerance_why: str = Field(description="key of `tolerances`")
    note: str = ""


class Published(Strict):
    """A file of published numbers."""

    title: str
    sources: dict[str, str]
    tolerances: dict[str, str] = Field(description="why a tolerance is as wide as it is")
    parameters: dict[Label, int] = Field(
        default_factory=dict, description="of the paper's models; another size is a stand-in and contradicts nothing"
    )
    numbers: tuple[Number, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Published:
        for i, n in enumerate(self.numbers):
            if unknown := set(n.source) - self.sources.keys():
                raise ValueError(f"numbers.{i}: unknown source {sorted(unknown)}")
            if n.tolerance_why not in self.tolerances:
                raise ValueError(f"numbers.{i}: unknown tolerance_why {n.tolerance_why!r}")
            if (n.against is not None) != (n.metric in {"accuracy_difference", "throughput_ratio"}):
                raise ValueError(f"numbers.{i}: `against` belongs to accuracy_difference and throughput_ratio alone")
        return self

    def beside(
        self, *, table: str, metric: Metric, model: str | None, task: str | None, method: str, suites: Collection[str]
    ) -> Number | None:
        """The number of one table for one of our cells; a property that its source does not state fits any of ours."""
        for n in self.numbers:
            same = n.table == table and n.metric == metric and n.method == method and n.against is None
            if same and n.model == model and n.task in (None, task) and set(n.suites) in (set(), set(suites)):
                return n
        return None

    def stand_ins(self, frames: Frames) -> dict[str, str]:
        """Models of a study that are not the paper's by their size, with both sizes in words."""
        found = {}
        for model, wanted in self.parameters.items():
            sizes = frames.runs.loc[frames.runs["model"] == model, "parameters"].dropna()
            if len(sizes) and abs(int(sizes.median()) - wanted) > SAME_SIZE * wanted:
                found[model] = f"{int(sizes.median()) / 1e6:,.1f} M parameters, the paper's has {wanted / 1e6:,.0f} M"
        return found


def load_published(path: Path) -> Published:
    """Read a file of published numbers.

    Raises:
        ConfigError: one line that names file, line and key.
    """
    source = read_yaml(path)
    loaded: Published = validate(Published, source.value, source)
    return loaded


def published_table(frames: Frames, published: Published) -> Table:
    """Every published number with its tolerance, and what this study measured for the same thing."""
    notes = Footnotes()
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    strange = published.stand_ins(frames)
    for n in published.numbers:
        value, n_runs, why = measured(n, frames)
        inside = (
            None
            if value is None or n.model in strange
            else (value > n.value if n.bound == "above" else abs(value - n.value) <= n.tolerance)
        )
        what = f"{n.metric.replace('_', ' ')}{_UNITS[n.unit]}" + (f" to {n.against}" if n.against else "")
        raw.append(
            n.model_dump(mode="json", exclude={"suites"})
            | {"suites": " ".join(n.suites), "measured": value, "measured_runs": n_runs, "within_tolerance": inside}
            | {"measured_why": why}
        )
        digits = 2
        shown = f"{'> ' if n.bound == 'above' else ''}{number(n.value, digits)}"
        display.append(
            {
                "table": n.table,
                "model": n.model or UNKNOWN + notes.mark("the source does not say."),
                "task": n.task or UNKNOWN + notes.mark("the source does not say."),
                "suites": n.suites[0] if len(n.suites) == 1 else f"mean of {len(n.suites)}" if n.suites else UNKNOWN,
                "method": n.method,
                "what": what,
                "published": shown + (notes.mark(n.note) if n.note else ""),
                "tolerance": f"± {number(n.tolerance, digits)}" + notes.mark(published.tolerances[n.tolerance_why]),
                "measured": f"not run{notes.mark(why)}" if value is None else f"{number(value, digits)} ({n_runs})",
                "within": UNKNOWN
                + (notes.mark(f"a stand-in for {n.model}: {strange[n.model]}.") if n.model in strange else "")
                if inside is None
                else "yes"
                if inside
                else "no",
                "source": n.source,
            }
        )
    for letter, text in published.sources.items():
        notes.add(f"Source {letter}: {text}")
    return Table(
        name="published",
        caption=f"{published.title}: published beside measured (number of ok runs). "
        "Tolerances were stated before anything was measured.",
        raw=DataFrame(raw),
        display=DataFrame(display),
        footnotes=notes.lines(),
    )


def measured(n: Number, frames: Frames) -> tuple[float | None, int, str]:
    """(value in the published unit, number of ok runs, reason if there is no value) for one published number."""
    if n.model is None or n.task is None:
        return None, 0, "the source leaves open which model or data this is, so nothing is comparable."
    if n.metric in {"extra_memory", "overhead_share"}:
        return None, 0, f"this study has no measurement of {n.metric.replace('_', ' ')}."
    runs = of_method(frames.ok_runs(), n.model, n.task, n.method)
    other = of_method(frames.ok_runs(), n.model, n.task, n.against) if n.against else runs
    if runs.empty or other.empty:
        return None, 0, "no ok run of this model, task and method in this study."
    if n.metric == "peak_memory":
        known = runs["nvml_process_peak_bytes"].dropna()
        if known.empty:
            return None, 0, "no device memory was measured in this study."
        return int(known.max()) / GIB, len(known), ""
    if n.metric == "throughput_ratio":
        speeds = [[float(v) for v in rows["throughput_tokens_per_s"].dropna()] for rows in (runs, other)]
        if not all(speeds):
            return None, 0, "throughput was not measured in this study."
        return median(speeds[0]) / median(speeds[1]), len(speeds[0]), ""
    return _accuracy(n, frames, runs, other)


def _accuracy(n: Number, frames: Frames, runs: DataFrame, other: DataFrame) -> tuple[float | None, int, str]:
    summaries = [summarise(values(frames, rows, "accuracy", n.suites)) for rows in (runs, other)]
    if not all(s.n for s in summaries):
        return None, 0, "not every suite of this number was scored in this study."
    mean, sd = summaries[0].mean, summaries[0].sd
    value = sd if n.metric == "accuracy_sd" else mean
    if n.metric == "accuracy_difference" and mean is not None and summaries[1].mean is not None:
        value = mean - summaries[1].mean
    if value is None:
        return None, 0, "one run has no standard deviation."
    return 100 * value, summaries[0].n, ""
