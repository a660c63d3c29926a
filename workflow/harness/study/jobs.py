"""The kinds of jobs in a study, one object per kind: everything that differs between kinds is defined here alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from harness.records import code
from harness.records.code import Roots
from harness.study.spec import (
    EvalJob,
    ForecastJob,
    Job,
    ModelJob,
    PretrainedHere,
    RowsJob,
    RunJob,
    SearchJob,
    SuiteJob,
)

J = TypeVar("J", bound=Job)

START_WEIGHT = 120.0
"""Weight of starting a job that imports torch and transformers, in optimizer steps of the embedded model."""
_ROWS_WEIGHT = 20.0


@dataclass(frozen=True, kw_only=True)
class Kind(Generic[J]):
    """One kind of job. Files are below the results folder; `{name}` in them is the job's name."""

    name: str
    spec: type[J]
    plural: str
    """Name of the field of `harness.study.plan.Plan` that holds its jobs."""
    spec_file: str
    """The job's resolved spec."""
    output: str
    """The one output that a job declares; this file names all other files that the job leaves."""
    weight: Callable[[J], float]
    """Work in a job, in optimizer steps (made, or as many as take about its time); for progress and time left."""
    roots: Callable[[J], Roots]
    """Root modules of the code that makes its record, see `harness.records.code`."""

    @property
    def root_folder(self) -> str:
        """The folder under results/ that holds its specs."""
        return self.spec_file.partition("/")[0]


def _model_weight(job: ModelJob) -> float:
    return 4.0 * job.source.steps if isinstance(job.source, PretrainedHere) else START_WEIGHT


def _model_roots(job: ModelJob) -> Roots:
    return code.PRETRAINED_MODEL if isinstance(job.source, PretrainedHere) else code.FOUND_MODEL


def _search_weight(job: SearchJob) -> float:
    return START_WEIGHT + len(job.search.grid) * len(job.search.seeds) * job.training.recipe.steps


MODEL = Kind(
    name="model",
    spec=ModelJob,
    plural="models",
    spec_file="inputs/models/{name}/spec.json",
    output="inputs/models/{name}/manifest.json",
    weight=_model_weight,
    roots=_model_roots,
)
ROWS = Kind(
    name="rows",
    spec=RowsJob,
    plural="rows",
    spec_file="inputs/rows/{name}/spec.json",
    output="inputs/rows/{name}/manifest.json",
    weight=lambda job: _ROWS_WEIGHT,
    roots=lambda job: code.ROWS,
)
SUITE = Kind(
    name="suite",
    spec=SuiteJob,
    plural="suites",
    spec_file="inputs/suites/{name}/spec.json",
    output="inputs/suites/{name}/manifest.json",
    weight=lambda job: _ROWS_WEIGHT,
    roots=lambda job: code.ROWS,
)
FORECAST = Kind(
    name="forecast",
    spec=ForecastJob,
    plural="forecasts",
    spec_file="forecasts/{name}/spec.json",
    output="forecasts/{name}/forecast.json",
    weight=lambda job: START_WEIGHT,
    roots=lambda job: code.run_forecast(job.training.module),
)
SEARCH = Kind(
    name="search",
    spec=SearchJob,
    plural="searches",
    spec_file="searches/{name}/spec.json",
    output="searches/{name}/search.json",
    weight=_search_weight,
    roots=lambda job: code.search(job.training.module),
)
TRAIN = Kind(
    name="train",
    spec=RunJob,
    plural="runs",
    spec_file="runs/{name}/spec.json",
    output="runs/{name}/train.json",
    weight=lambda job: START_WEIGHT + job.training.recipe.steps,
    roots=lambda job: code.training(job.training.module),
)
EVALUATE = Kind(
    name="evaluate",
    spec=EvalJob,
    plural="evals",
    spec_file="evals/{name}.json",
    output="runs/{run}/eval/{name}.json",
    weight=lambda job: 1.2 * START_WEIGHT,
    roots=lambda job: code.EVALUATION,
)
"""The one kind whose spec is shared: several runs are scored by one spec, and each run has its own scores."""

KINDS: tuple[Kind[Any], ...] = (MODEL, ROWS, SUITE, FORECAST, SEARCH, TRAIN, EVALUATE)
"""All kinds, each after the kinds that it depends on."""
