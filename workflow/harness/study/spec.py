"""The study's config as strict models, and the resolved spec of every job with its name.

Imports no torch, so a thousand runs are planned in seconds. A job's name ends in the first 8 digits of the sha256 of
its resolved spec, so a changed entry makes a new job beside the old one, and studies share equal jobs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from baselines.method import Recipe, Strict, later
from harness.study.labels import Label
from harness.study.views import FigureKind, View

MOST_RUNS = 10_000
LARGEST_SEED = 2**32 - 1
"""Of numpy's generators."""
Scoring = Literal["number", "letter", "true_false", "solution", "answer", "ending", "option"]
FileScoring = Literal[Scoring, "likelihood"]
Choices = Literal["labels", "texts"]
"""The labels as they were trained ("the correct answer is answer1"), or the options' texts, as stock lm-eval."""
PromptName = Literal["llm-adapters", "alpaca", "plain", "chat"]


UNTRAINED = "base"
"""Module of the untrained model: a row of the tables, but not a rival."""


# ---------------------------------------------------------------- models


class Corpus(Strict):
    """Text the embedded model is pretrained on; every share is a probability per piece of text."""

    one_step_share: float = Field(ge=0, le=1, description="one-step word problems with their worked answer")
    fact_share: float = Field(ge=0, le=1, description="of the rest: arithmetic facts")
    guess_share: float = Field(
        ge=0, le=1, description="of what remains: multiple choice answered at random; everything else is stories"
    )


class PretrainedHere(Strict):
    """A small Llama that the study pretrains itself."""

    kind: Literal["pretrain"]
    layers: int = Field(gt=0)
    width: int = Field(gt=0)
    heads: int = Field(gt=0)
    feed_forward: int = Field(gt=0)
    corpus: Corpus
    steps: int = Field(gt=0)
    rows: int = Field(gt=0, description="sequences per step")
    length: int = Field(gt=1, description="tokens per sequence")
    lr: float = Field(gt=0)
    seed: int = Field(ge=0, le=LARGEST_SEED)

    @model_validator(mode="after")
    def _divisible(self) -> PretrainedHere:
        if self.width % (2 * self.heads):
            raise ValueError(f"width: must be a multiple of twice the heads ({self.heads}), so that a head can rotate")
        return self


class LocalModel(Strict):
    """A model folder in Hugging Face layout; `${NAME}` is an environment variable named in the study's `inputs`."""

    kind: Literal["local"]
    path: str


class HubModel(Strict):
    """A checkpoint of the Hugging Face hub, pinned."""

    kind: Literal["hub"]
    repo: str
    revision: str = Field(description="a commit, so that the same weights come every time")


ModelSource = Annotated[PretrainedHere | LocalModel | HubModel, Field(discriminator="kind")]


# ---------------------------------------------------------------- tasks


class GeneratedRows(Strict):
    """Training rows made by the study's own seeded generator."""

    kind: Literal["generated"]
    family: Literal["arithmetic", "choice"]
    seed: int = Field(ge=0, le=LARGEST_SEED)
    train_rows: int = Field(gt=0)
    validation_rows: int = Field(gt=0)


class Columns(Strict):
    """Which column of a data set holds what: a column's name, or a text with `{column}` in it.

    Without this block the columns are called as the keys here, or are those of GSM8K (question, answer).
    """

    instruction: str | None = None
    input: str | None = Field(default=None, description="what the instruction is about; may be empty in some rows")
    output: str | None = Field(default=None, description="what training is to write; by default the answer")
    answer: str | None = Field(default=None, description="the gold answer that is scored; by default the output")
    messages: str | None = Field(default=None, description="a conversation: a list of role and content")

    @model_validator(mode="after")
    def _enough(self) -> Columns:
        if self.messages is not None:
            if self.instruction is not None or self.input is not None or self.output is not None:
                raise ValueError("messages: a conversation holds instruction, input and output: remove those keys")
        elif self.instruction is None:
            raise ValueError("name the column that holds the `instruction` (or `messages`, for conversations)")
        elif self.output is None and self.answer is None:
            raise ValueError("name the column that holds the `output`, or the `answer`, or both")
        return self


class ReadRows(Strict):
    """What training rows from files and from the hub have in common."""

    columns: Columns | None = later(None)
    without: tuple[str, ...] = later(
        (), description="files, such as test sets: rows whose text occurs in one, numbers masked, are left out"
    )
    seed: int = Field(ge=0, le=LARGEST_SEED, description="of the split into training and validation rows")
    train_rows: int | None = Field(default=None, gt=0, description="null takes every row")
    validation_rows: int = Field(gt=0)


class OtherFile(Strict):
    """A file whose columns are called otherwise than those of the files beside it."""

    path: str
    columns: Columns


class FileRows(ReadRows):
    """Training rows read from files: .json, .jsonl, .csv or .parquet, each also gzipped (.gz)."""

    kind: Literal["files"]
    paths: tuple[str | OtherFile, ...] = Field(
        min_length=1, description="each a path, or a path with `columns` of its own"
    )

    @property
    def files(self) -> list[tuple[str, Columns | None]]:
        """Every file with its columns, in order."""
        return [(f, self.columns) if isinstance(f, str) else (f.path, f.columns) for f in self.paths]


class HubData(Strict):
    """A data set of the Hugging Face hub, pinned; a folder MIRROR/<org>/<name> is taken before the network."""

    repo: str = Field(description="<org>/<name>")
    config: str | None = Field(default=None, description="of data sets that have several")
    split: str
    revision: str = Field(description="a commit, so that the same rows come every time; a mirror has no revisions")

    @model_validator(mode="after")
    def _named(self) -> HubData:
        if self.repo.count("/") != 1:
            raise ValueError("repo: <organisation>/<name> is wanted, such as openai/gsm8k")
        return self


class HubRows(HubData, ReadRows):
    """Training rows of a data set of the hub."""

    kind: Literal["hub"]


RowSource = Annotated[GeneratedRows | FileRows | HubRows, Field(discriminator="kind")]


class GeneratedSuite(Strict):
    """Test items of the generator; disjoint from every training row by construction."""

    kind: Literal["generated"]
    variant: Literal["two-step", "three-step", "choice"]
    seed: int = Field(ge=0, le=LARGEST_SEED)
    rows: int = Field(gt=0)
    scoring: Scoring
    max_new_tokens: int = Field(gt=0)


class ReadSuite(Strict):
    """What test items from files and from the hub have in common."""

    columns: Columns | None = later(None)
    limit: int | None = Field(default=None, gt=0, description="the first rows only; null takes all")
    scoring: FileScoring = Field(
        description="a rule that reads the answer from what the model writes; or the likeliest of the allowed answers"
    )
    max_new_tokens: int | None = later(None, gt=0, description="of what the model writes; not with likelihood")
    beams: int = later(
        1, gt=0, le=64, description="of beam search, row by row as the published scripts; 1 decodes greedily in batches"
    )
    choices: Choices | None = later(None, description="with likelihood: what the allowed answers are")

    @model_validator(mode="after")
    def _one_protocol(self) -> ReadSuite:
        likelihood = self.scoring == "likelihood"
        if likelihood and self.choices is None:
            raise ValueError(f"choices: scoring likelihood needs it: {' or '.join(get_args(Choices))}")
        if likelihood and self.max_new_tokens is not None:
            raise ValueError("max_new_tokens: nothing is written under scoring likelihood: remove this key")
        if likelihood and self.beams > 1:
            raise ValueError("beams: nothing is written under scoring likelihood: remove this key")
        if not likelihood and self.choices is not None:
            raise ValueError(f"choices: belongs to scoring likelihood; scoring {self.scoring} reads what is written")
        if not likelihood and self.max_new_tokens is None:
            raise ValueError(f"max_new_tokens: this key is missing; scoring {self.scoring} needs it")
        return self


class FileSuite(ReadSuite):
    """Test items of a file: .json, .jsonl, .csv or .parquet, also gzipped (.gz)."""

    kind: Literal["files"]
    path: str


class HubSuite(HubData, ReadSuite):
    """Test items of a data set of the hub."""

    kind: Literal["hub"]


class LmEvalSuite(Strict):
    """A task, group or tag of lm-eval by its name, with lm-eval's own prompt, metrics and version."""

    kind: Literal["lm-eval"]
    task: str = Field(min_length=1, description="as `lm-eval ls tasks` lists it")
    num_fewshot: int | None = Field(default=None, ge=0, description="null takes the task's own number")
    limit: int | None = Field(default=None, gt=0, description="the first items of each task only; null takes all")
    apply_chat_template: bool = Field(default=False, description="ask in the tokenizer's own chat format")


SuiteSource = Annotated[GeneratedSuite | FileSuite | HubSuite | LmEvalSuite, Field(discriminator="kind")]


class Task(Strict):
    """One training set and the suites that are scored after training on it."""

    train: RowSource
    prompt: PromptName = later("llm-adapters", description="how a row becomes text, in training and in scoring")
    suites: dict[Label, SuiteSource] = Field(default_factory=dict, description="none: held-out loss only")
    recipe: dict[str, Any] = Field(default_factory=dict, description="laid over the study's recipe")


# ---------------------------------------------------------------- methods


class MethodEntry(Strict):
    """One row of the tables: a file in baselines/ with its options."""

    module: str
    options: dict[str, Any] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(
        default_factory=dict, description="what this method changes outside its own block; shown as a dagger"
    )
    lr: float | None = Field(default=None, gt=0, description="fixed; null takes the study's search")
    seeds: tuple[int, ...] | None = Field(default=None, min_length=1, description="null takes the study's seeds")
    shots: int = Field(
        default=0,
        ge=0,
        description="worked examples, the first training rows of the task, before every test question; not trained so",
    )
    gpus: int | None = Field(default=None, gt=0, description="null takes the study's `runtime.gpus`")
    note: str = ""


class Search(Strict):
    """Learning-rate search, the same for every method: same grid, same seeds, same steps, same rule."""

    grid: tuple[float, ...] = Field(min_length=3)
    seeds: tuple[int, ...] = Field(min_length=1, description="disjoint from the study's seeds")
    max_extensions: int = Field(ge=0, description="points added, one by one, while the best lies at an edge")
    share: float = later(
        1.0,
        gt=0,
        le=1,
        description="of a run's steps and warm-up steps that a trial takes, with the whole schedule in it",
    )


class Observation(Strict):
    """The observer probe: true gradient norms of all layers on fixed validation rows, outside the clock."""

    every_steps: int = Field(gt=0)
    rows: int = Field(gt=0)


class Probes(Strict):
    """Gradient norms of all layers of every model before training, on batches of every task's training rows."""

    batches: int = Field(ge=4, description="measured one by one; half of them against the other half is the noise")
    rows: int = Field(gt=0, description="training rows in a batch")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="of the order in which rows are taken")


class Runtime(Strict):
    """How runs are carried out. It does not change their results, so it never enters a job's name."""

    threads: int = Field(default=1, gt=0, le=1024, description="torch threads of one job")
    gpus: int = Field(
        default=1,
        gt=0,
        le=1024,
        description="processes that train one run, each on a GPU of its own, with its share of every step's "
        "micro-batches; with device cpu, processes alone",
    )
    checkpoint_every_steps: int = Field(default=100, gt=0, description="resume state is written this often")
    eval_batch_size: int = Field(default=64, gt=0)
    keep: Literal["none", "last", "all"] | None = Field(
        default=None,
        description="exported models that stay on disk once they are scored: none, all, or last, of each method the "
        "one of its last seed; null: none of models above 1 GiB, else all",
    )


class Comparison(Strict):
    """Some of the study's methods side by side, with their own table and figures."""

    title: str
    methods: tuple[Label, ...] = Field(min_length=2, description="the first is what the others are compared with")
    reading: str = Field(description="what the comparison isolates, and what it cannot show")


class Question(Strict):
    """What the study asks of one of its methods; the report answers it first, from the records."""

    ask: str
    method: Label
    controls: dict[Label, str] = Field(
        min_length=1, description="method: what comparing with it isolates; the first one decides the answer"
    )


class Study(Strict):
    """One file under config/: a list of runs."""

    study: Label
    title: str
    notes: tuple[str, ...] = Field(default=(), description="paragraphs shown in the report")
    inputs: dict[str, str] = Field(
        default_factory=dict, description="environment variable that holds a path: what should be there"
    )
    published: str | None = Field(default=None, description="file of published numbers shown beside measured ones")
    claims: str | None = Field(default=None, description="file of a paper's claims, judged by what was measured")
    seeds: tuple[int, ...] = Field(min_length=1)
    models: dict[Label, ModelSource] = Field(min_length=1)
    tasks: dict[Label, Task] = Field(min_length=1)
    methods: dict[Label, MethodEntry] = Field(min_length=1)
    forgetting: dict[Label, SuiteSource] = Field(
        default_factory=dict, description="suites of no task, scored for every run and, before, for the untrained model"
    )
    comparisons: dict[Label, Comparison] = Field(
        default_factory=dict, description="groups of methods with tables and figures of their own"
    )
    question: Question | None = None
    views: dict[Label, View] = Field(default_factory=dict, description="tables by their names, such as a paper's")
    figures: dict[FigureKind, str] = Field(
        default_factory=dict, description="kind of ours: the paper's figure that it measures anew"
    )
    recipe: Recipe
    search: Search | None = None
    observation: Observation
    probes: Probes | None = Field(default=None, description="null: importance before training is not measured")
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        used = [("seeds", self.seeds)]
        used += [(f"methods.{k}.seeds", m.seeds) for k, m in self.methods.items() if m.seeds]
        if self.search and set(self.search.seeds) & {seed for _, seeds in used for seed in seeds}:
            raise ValueError("search.seeds: must differ from the seeds of all runs, or the search sees the test runs")
        for name, seeds in [*used, *([("search.seeds", self.search.seeds)] if self.search else [])]:
            if len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) > LARGEST_SEED:
                raise ValueError(f"{name}: must be distinct whole numbers from 0 to {LARGEST_SEED}")
        seeds_of_methods = sum(len(entry.seeds or self.seeds) for entry in self.methods.values())
        if (runs := len(self.models) * len(self.tasks) * seeds_of_methods) > MOST_RUNS:
            raise ValueError(f"{runs} runs are asked for, at most {MOST_RUNS} may be: make several studies of them")
        for label in self.forgetting:
            tasks = [task for task, entry in self.tasks.items() if label in entry.suites]
            if tasks:
                raise ValueError(f"forgetting.{label}: task {tasks[0]} has a suite of this label; call it otherwise")
        if self.forgetting and self.untrained() is None:
            raise ValueError(
                "forgetting: nothing is scored before training: add an entry to `methods`, "
                f"such as `base: {{module: {UNTRAINED}, seeds: [0]}}`"
            )
        for label, comparison in self.comparisons.items():
            unknown = [method for method in comparison.methods if method not in self.methods]
            if unknown:
                raise ValueError(f"comparisons.{label}.methods: the study has no method {', '.join(unknown)}")
            if len(set(comparison.methods)) != len(comparison.methods):
                raise ValueError(f"comparisons.{label}.methods: each method once")
            if label in self.methods:
                raise ValueError(f"comparisons.{label}: a method has this label; call the comparison otherwise")
        if self.question is not None:
            for label in (self.question.method, *self.question.controls):
                if label not in self.methods:
                    raise ValueError(f"question: the study has no method {label}")
            if self.question.method in self.question.controls:
                raise ValueError(f"question.controls: {self.question.method} cannot be compared with itself")
        suites = {task: entry.suites.keys() for task, entry in self.tasks.items()}
        for label, view in self.views.items():
            if why := view.complaint(models=self.models, tasks=suites, methods=self.methods):
                raise ValueError(f"views.{label}.{why}")
        if self.search and (len(set(self.search.grid)) != len(self.search.grid) or min(self.search.grid) <= 0):
            raise ValueError("search.grid: must be distinct rates above 0")
        return self

    def untrained(self) -> str | None:
        """The method whose scores are those before training: of module base, with the fewest shots."""
        entries = [(entry.shots, label) for label, entry in self.methods.items() if entry.module == UNTRAINED]
        return min(entries, key=lambda entry: entry[0])[1] if entries else None
