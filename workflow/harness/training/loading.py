"""From a resolved spec to everything that the training loop needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from grass.distributed import ranks
from grass.layers import declared_module
from harness.inputs.models import check_savable, generation_why, load_model, load_tokenizer
from harness.inputs.prompts import Prompt
from harness.inputs.rows import read_rows
from harness.inputs.tokens import Encoded, check_ids, encode_rows
from harness.records.held import check_files
from harness.records.inputs import RowsRecord
from harness.records.reading import read
from harness.records.run import DataUse
from harness.step.architecture import Attention, attention_of, check_length
from harness.step.attach import Attached, attach, new_method, refusals
from harness.step.facts import layers_of
from harness.step.loss import check_chunked
from harness.step.observer import Observer
from harness.study.identity import files_of, known_model
from harness.study.jobs import MODEL, ROWS, ProbeJob, Training
from harness.study.paths import Paths, resolve
from harness.study.spec import Observation, PromptName
from harness.training.batches import Batches, fixed_batches
from harness.training.engagement import Watch
from harness.training.ranks import rank


@dataclass(frozen=True)
class Inputs:
    """Where a run finds what it reads: folders that earlier jobs made."""

    model: Path
    rows: Path
    model_text: str = ""
    """The model's folder as written in its manifest, without a path of this machine."""
    made_from: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the files of both folders, by role, as their manifests have them; a resume state made from other files
    is not taken up."""

    def files(self) -> dict[str, Path]:
        """The files that a run reads, by role."""
        found = {"train rows": self.rows / "train.json", "validation rows": self.rows / "validation.json"}
        return found | {f"model {path.name}": path for path in files_of(self.model)}


def inputs_of(job: Training | ProbeJob, paths: Paths) -> Inputs:
    """The inputs that earlier jobs made for a run or a probe.

    Raises:
        UserError: a manifest is missing, or the model or the rows are not those that their manifest was made from.
    """
    model = known_model(paths.output(MODEL, job.model.name))
    rows_manifest = paths.output(ROWS, job.rows.name)
    rows = read(rows_manifest, RowsRecord)
    check_files(rows_manifest, rows.files_sha256)
    hashes = {f"model {name}": value for name, value in model.files_sha256.items()}
    hashes |= {f"rows {name}": value for name, value in rows.files_sha256.items()}
    return Inputs(resolve(model.folder), paths.rows(job.rows.name), model.folder, hashes)


@dataclass(frozen=True)
class Loaded(Attached):
    """A model with a method attached, with its batches and observers."""

    own_parameters: list[nn.Parameter]
    """The model's parameters before any method touched it."""
    watch: Watch
    observer: Observer
    batches: Batches
    validation: list[Encoded]
    pad_id: int
    observed: list[dict[str, Tensor]]
    """Fixed validation rows of the observer probe."""
    data: DataUse
    attention: Attention
    notes: list[str]
    """What is worth a line in the run's record."""


@dataclass(frozen=True)
class _Texts:
    """What a run reads besides its model."""

    tokenizer: Any
    rows: list[Encoded]
    held: list[Encoded]
    data: DataUse


def _texts(training: Training, inputs: Inputs) -> _Texts:
    """Tokenizer and rows; the next trial of a search finds them read, if it is known by hashes what they are."""
    made_from = tuple(sorted(inputs.made_from.items()))
    read_texts = _read_texts if made_from else _read_texts.__wrapped__
    recipe = training.recipe
    return read_texts(inputs.model, inputs.rows, made_from, training.prompt, recipe.max_length, recipe.loss_on)


@lru_cache(maxsize=1)
def _read_texts(
    model: Path,
    rows: Path,
    made_from: tuple[tuple[str, str], ...],
    prompt: PromptName,
    max_length: int,
    loss_on: Literal["answer", "all"],
) -> _Texts:
    tokenizer = load_tokenizer(model)
    asked = Prompt(prompt, tokenizer)
    trained, data = encode_rows(asked, read_rows(rows / "train.json"), max_length=max_length, loss_on=loss_on)
    held, _ = encode_rows(asked, read_rows(rows / "validation.json"), max_length=max_length, loss_on="answer")
    return _Texts(tokenizer, trained, held, data)


def load(training: Training, *, lr: float | None, seed: int, inputs: Inputs, observation: Observation | None) -> Loaded:
    """Load model and rows, attach the method.

    Raises:
        CannotRunError: a package is missing, the method refuses, the layers are not found, the model has too few
            positions, or its loss cannot be computed in chunks; the message is the reason.
        UserError: the model's folder is at fault: see `load_model`, `load_tokenizer`, `check_ids` and `check_savable`.
    """
    recipe = training.recipe
    method = new_method(training.module, training.options, recipe=recipe, lr=lr, seed=seed)
    texts = _texts(training, inputs)
    tokenizer, rows, held, data = texts.tokenizer, texts.rows, texts.held, texts.data
    model = load_model(inputs.model, weight_dtype=recipe.weight_dtype)
    check_length(model, recipe.max_length, what="recipe.max_length")
    ids = (row.input_ids for row in (*rows, *held))
    check_ids(ids, tokenizer=tokenizer, embedding=declared_module(model, "get_input_embeddings"))
    check_savable(model, tokenizer, path=inputs.model)
    attention, unsavable = attention_of(model), generation_why(inputs.model)
    model = model.to(recipe.device)
    on_device: dict[str, Any] = {"pad_id": tokenizer.pad_token_id, "device": recipe.device}
    batches = Batches(
        rows,
        batch_size=recipe.batch_size,
        micro_batch_size=recipe.micro_batch_size,
        seed=seed,
        share=(rank(), ranks()),
        **on_device,
    )
    observed = fixed_batches(held[: observation.rows if observation else 0], size=recipe.micro_batch_size, **on_device)
    layers, own = layers_of(model), list(model.parameters())
    # from here on every new tensor that stays alive counts as the method's
    watch = Watch(model, layers)
    attached = attach(method, model)
    watch.attached(attached.module)
    if recipe.chunked_loss:
        with refusals():
            check_chunked(attached.module, batches.calibration_batch(0))
    return Loaded(
        **vars(attached),
        own_parameters=own,
        watch=watch,
        observer=Observer(layers),
        batches=batches,
        validation=held,
        pad_id=tokenizer.pad_token_id,
        observed=observed,
        data=data,
        attention=attention,
        notes=[] if unsavable is None else [unsavable],
    )
