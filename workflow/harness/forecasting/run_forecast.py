"""Will a run fit its GPU? A forecast of the run's own model, method and recipe, made once for all seeds."""

from __future__ import annotations

from pathlib import Path

import torch

from harness.forecasting.forecast import Looks, NoForecastError, forecast
from harness.forecasting.needed import needed_bytes
from harness.inputs.models import load_tokenizer
from harness.inputs.prompts import Prompt
from harness.inputs.rows import read_rows
from harness.inputs.tokens import encode_rows
from harness.records.code import run_forecast as roots_of
from harness.records.provenance import provenance
from harness.records.reading import read
from harness.records.run import RunForecast
from harness.records.units import gib
from harness.step.outcomes import CannotRunError
from harness.step.spec import Cell, Numerics, Settings, Shape
from harness.study.jobs import Training


def forecast_run(training: Training, *, name: str, model: Path, rows: Path) -> RunForecast:
    """Forecast the largest step of a run: full micro-batches whose rows are all as long as the longest row.

    The harness's own probe and validation are forecast with it.

    Args:
        training: specification of the run.
        name: of the record.
        model: the model's folder; only its configuration and tokenizer are read.
        rows: folder of the training rows.
    """
    recipe = training.recipe
    prompt = Prompt(training.prompt, load_tokenizer(model))
    longest, longest_held = (
        max(len(row.input_ids) for row in encode_rows(
            prompt, read_rows(rows / f"{split}.json"), max_length=recipe.max_length, loss_on=recipe.loss_on
        )[0])
        for split in ("train", "validation")
    )  # fmt: skip
    looks = Looks(
        observed=Shape(batch=recipe.micro_batch_size, length=max(2, longest_held)),
        evaluated=Shape(batch=recipe.micro_batch_size, length=recipe.max_length),
    )
    cell = Cell(
        model=model,
        module=training.module,
        options=training.options,
        settings=Settings(activation_checkpointing=recipe.activation_checkpointing, chunked_loss=recipe.chunked_loss),
        shape=Shape(batch=recipe.micro_batch_size, length=max(2, longest)),
        numerics=Numerics(
            weight_dtype=recipe.weight_dtype,
            state_dtype=recipe.state_dtype,
            stochastic_rounding=recipe.stochastic_rounding,
            max_grad_norm=recipe.max_grad_norm,
        ),
        micro_batches=recipe.accumulation_steps,
        autocast=recipe.autocast,
    )
    try:
        found, why = forecast(cell, looks=looks), None
    except (CannotRunError, NoForecastError) as error:
        found, why = None, str(error)
    return RunForecast(
        name=name,
        longest_row_tokens=longest,
        peak_bytes=None if found is None else found.peak_bytes,
        peak_phase=None if found is None else found.peak_phase,
        needed_bytes=None if found is None else needed_bytes(found.peak_bytes),
        peak_why=why,
        provenance=provenance(roots=roots_of(training.module), inputs={"config": model / "config.json"}),
    )


def refusal(record: RunForecast, total_bytes: int) -> str | None:
    """Why a run cannot fit on a GPU of `total_bytes`; None if it fits, or if there is no forecast."""
    if record.needed_bytes is None or record.needed_bytes <= total_bytes:
        return None
    assert record.peak_bytes is not None
    return (
        f"cannot fit its GPU: the forecast of a step is {gib(record.peak_bytes)} GiB, in {record.peak_phase}, "
        f"with context and fragments {gib(record.needed_bytes)} GiB, and the GPU has {gib(total_bytes)} GiB"
    )


def refusal_of(file: Path | None) -> str | None:
    """The same for the GPU that this process has leased; `file` is the record, None for a run without a forecast."""
    if file is None:
        return None
    record = read(file, RunForecast)
    return refusal(record, torch.cuda.get_device_properties(0).total_memory)
