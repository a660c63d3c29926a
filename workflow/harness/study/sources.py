"""Where models, rows and suites of a study come from: the blocks `models`, `train` and `suites` of its config. Imports
no torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from baselines.method import Strict, later

LARGEST_SEED = 2**32 - 1
"""Of numpy's generators."""
Scoring = Literal["number", "letter", "true_false", "solution", "answer", "ending", "option"]
FileScoring = Literal[Scoring, "likelihood"]
Choices = Literal["labels", "texts"]
"""The labels as they were trained ("the correct answer is answer1"), or the options' texts, as stock lm-eval."""


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
