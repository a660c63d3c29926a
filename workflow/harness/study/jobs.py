"""Jobs of a study: their resolved specs, and what differs between their kinds, one object per kind.

A job's name ends in the first 8 digits of the sha256 of its resolved spec, so a changed entry makes a new job beside
the old one, and studies share equal jobs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field

from baselines.method import Recipe, Strict, later
from harness.errors import UserError
from harness.records import code
from harness.records.code import Roots
from harness.records.reading import read
from harness.study.labels import Label
from harness.study.sources import LmEvalSuite, ModelSource, PretrainedHere, RowSource, SuiteSource
from harness.study.spec import Observation, Probes, PromptName, Search

# ---------------------------------------------------------------- resolved specs: one per job


def digest(value: Any) -> str:
    """First 8 hex digits of the sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


J = TypeVar("J", bound="Job")


class Job(Strict):
    """A resolved spec. `name` is what the job is called on disk."""

    def body(self) -> dict[str, Any]:
        """The spec as plain JSON values, defaults included."""
        return self.model_dump(mode="json")

    @property
    def name(self) -> str:
        """Readable labels, then the first digits of the spec's hash."""
        raise NotImplementedError


class SourcedJob(Job):
    """Something made from its `source` alone: two entries with one source differ by label only."""

    label: Label

    @property
    def name(self) -> str:
        """`<label>--<hash of the source>`."""
        return f"{self.label}--{digest(self.body()['source'])}"


class ModelJob(SourcedJob):
    """A model, ready to load: pretrained here, found locally, or fetched."""

    source: ModelSource


class RowsJob(SourcedJob):
    """Training and validation rows of one task, as files."""

    source: RowSource


class SuiteJob(SourcedJob):
    """Test rows of one suite, or the data of a task of lm-eval, as files."""

    source: SuiteSource


class Training(Strict):
    """Everything that determines a training run, except the learning rate and the seed."""

    model: ModelJob
    rows: RowsJob
    label: Label = Field(description="of the method's entry")
    module: str
    options: dict[str, Any] = Field(description="complete: the method's defaults are filled in")
    recipe: Recipe
    prompt: PromptName = later("llm-adapters")
    recipe_changes: tuple[str, ...] = Field(description="recipe keys the method's entry changed: the dagger")


class SearchJob(Job):
    """Choice of the learning rate of one method on one model and task."""

    training: Training
    search: Search

    @property
    def trial(self) -> Training:
        """What a trial trains: as a run, over `search.share` of its steps and warm-up steps."""
        recipe, share = self.training.recipe, self.search.share
        steps = max(1, round(share * recipe.steps))
        shorter = {"steps": steps, "warmup_steps": min(round(share * recipe.warmup_steps), steps - 1)}
        return self.training.model_copy(update={"recipe": recipe.model_copy(update=shorter)})

    @property
    def name(self) -> str:
        """`<model>--<task>--<method>--<hash of the spec>`."""
        t = self.training
        return f"{t.model.label}--{t.rows.label}--{t.label}--{digest(self.body())}"


class RunJob(Job):
    """One training run."""

    training: Training
    lr: float | None = Field(description="null: taken from `search`, or no step is taken")
    search: Search | None
    seed: int
    observation: Observation

    @property
    def name(self) -> str:
        """`<model>--<task>--<method>--seed<k>--<hash of the spec>`."""
        t = self.training
        return f"{t.model.label}--{t.rows.label}--{t.label}--seed{self.seed}--{digest(self.body())}"

    def search_job(self) -> SearchJob | None:
        """The search this run takes its learning rate from."""
        if self.lr is not None or self.search is None:
            return None
        return SearchJob(training=self.training, search=self.search)


class ForecastJob(Job):
    """Forecast of a run's peak memory, one for all seeds and learning rates."""

    training: Training

    @property
    def name(self) -> str:
        """`<model>--<task>--<method>--<hash of the spec>`."""
        t = self.training
        return f"{t.model.label}--{t.rows.label}--{t.label}--{digest(self.body())}"


class ProbeJob(Job):
    """Gradient norms of all layers of an untrained model on one task's rows; no method and no step enter it."""

    model: ModelJob
    rows: RowsJob
    probes: Probes
    prompt: PromptName = later("llm-adapters")
    max_length: int = Field(description="this and what follows: as in the task's recipe")
    loss_on: Literal["answer", "all"]
    weight_dtype: Literal["fp32", "bf16"]
    compute_dtype: Literal["fp32", "bf16"] | None = later(None)
    device: Literal["cpu", "cuda"]

    @property
    def name(self) -> str:
        """`<model>--<task>--<hash of the spec>`."""
        return f"{self.model.label}--{self.rows.label}--{digest(self.body())}"

    @property
    def autocast(self) -> bool:
        """As `Recipe.autocast`."""
        return self.compute_dtype == "bf16" and self.weight_dtype == "fp32"


class OverlapJob(Job):
    """What a task's suites share with its training rows; suites of lm-eval keep their own rows and are not compared."""

    rows: RowsJob
    suites: tuple[SuiteJob, ...]

    @property
    def name(self) -> str:
        """`<task>--<hash of the spec>`."""
        return f"{self.rows.label}--{digest(self.body())}"


class EvalJob(Job):
    """How a trained model is scored: every suite of its task, and those of `forgetting`, in one process."""

    task: Label
    suites: tuple[SuiteJob, ...]
    max_length: int = Field(description="tokens of prompt and answer in the held-out loss, as in training")
    prompt: PromptName = later("llm-adapters")
    shots: int = later(0, description="worked examples before every question of `suites`")
    forgetting: tuple[SuiteJob, ...] = later(())

    @property
    def all_suites(self) -> tuple[SuiteJob, ...]:
        """Suites of the task, then those of forgetting."""
        return (*self.suites, *self.forgetting)

    @property
    def name(self) -> str:
        """`<task>--<hash of the spec>`."""
        return f"{self.task}--{digest(self.body())}"


def read_job(path: Path, kind: type[J], name: str) -> J:
    """The spec in a file, which must be the one that the job's name has the hash of.

    Raises:
        UserError: no such file, no spec, or another job's.
    """
    job = read(path, kind)
    if job.name != name:
        raise UserError(f"{path}: the spec of {job.name}, not of {name}: changed by hand? Remove it and run again")
    return job


# ---------------------------------------------------------------- kinds of jobs

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
    return START_WEIGHT + len(job.search.grid) * len(job.search.seeds) * job.trial.recipe.steps


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
    roots=lambda job: code.STOCK_SUITE if isinstance(job.source, LmEvalSuite) else code.ROWS,
)
OVERLAP = Kind(
    name="overlap",
    spec=OverlapJob,
    plural="overlaps",
    spec_file="inputs/overlaps/{name}/spec.json",
    output="inputs/overlaps/{name}/overlap.json",
    weight=lambda job: _ROWS_WEIGHT,
    roots=lambda job: code.OVERLAP,
)
PROBE = Kind(
    name="probe",
    spec=ProbeJob,
    plural="probes",
    spec_file="probes/{name}/spec.json",
    output="probes/{name}/probe.json",
    weight=lambda job: START_WEIGHT + job.probes.batches,
    roots=lambda job: code.PROBE,
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

KINDS: tuple[Kind[Any], ...] = (MODEL, ROWS, SUITE, OVERLAP, PROBE, FORECAST, SEARCH, TRAIN, EVALUATE)
"""All kinds, each after the kinds that it depends on."""
