"""Accuracy of one suite through lm-eval, with our own task files and without any default of the checkpoint."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.inputs.prompts import Row, evaluation_prompt
from harness.study.spec import Scoring
from harness.tasks.protocol import extract, kept_text

TASKS = Path(__file__).parents[1] / "tasks"

PROTOCOL = "llm-adapters (greedy)"
DEVIATIONS = (
    "greedy decoding; published: beam search with 4 beams",
    "batches, left-padded, with attention mask; published: one row at a time and no mask",
    "end of text is the tokenizer's end token, as in training; published: whatever the checkpoint names",
    "special tokens skipped in the decoded text of all suites; published: kept in arithmetic",
    "evaluation mode, adapters merged; published: adapter dropout seems active while scoring",
    "max_new_tokens as given for each suite; published: 256 in arithmetic, 32 in commonsense",
)
"""Where this differs from the published scripts (protocol sheet, sections 4 and 5)."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one test row."""

    correct: bool
    prediction: str | None
    """Answer extracted from the continuation; None if the scoring rule found none."""


@dataclass(frozen=True, kw_only=True)
class SuiteOutcome:
    """All rows of one suite, in the order of its file."""

    outcomes: tuple[Outcome, ...]
    truncated_rows: int
    """Rows whose prompt exceeds the model's context minus `max_new_tokens`: its beginning was cut off."""


def wrap(model: Any, tokenizer: Any, *, batch_size: int) -> Any:
    """An lm-eval model around a loaded model, so that the model is loaded only once for all suites of a run.

    Replaces the model's generation configuration: fields left unset in a call are filled from it, and checkpoints bring
    their own sampling, repetition penalties and end tokens.

    Raises:
        UserError: the tokenizer has no end token.
    """
    import datasets
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    # lm-eval's warnings (a model object instead of a name, cut prompts) are expected here, or counted by us.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no end token; set eos_token in its config")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    # Only this argument switches off its progress bar, and `evaluate` does not pass it.
    lm.generate_until = partial(lm.generate_until, disable_tqdm=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=lm.tokenizer.pad_token_id,
    )
    return lm


def decoding(lm: Any) -> dict[str, Any]:
    """Every generation setting that is the same for all suites, for the record."""
    return {
        "protocol": PROTOCOL,
        "deviations": list(DEVIATIONS),
        "do_sample": False,
        "num_beams": 1,
        "bos_token_id": lm.tokenizer.bos_token_id,
        "eos_token_id": lm.tokenizer.eos_token_id,
        "pad_token_id": lm.tokenizer.pad_token_id,
        "stop_strings": [],
        "padding_side": "left",
        "attention_mask": True,
        "key_value_cache": True,
        "batch_size": lm.batch_size,
        "max_context_tokens": lm.max_length,
        "weight_dtype": str(lm.model.dtype).removeprefix("torch."),
        "lm_eval": version("lm_eval"),
    }


def score_suite(lm: Any, *, file: Path, rows: Sequence[Row], scoring: Scoring, max_new_tokens: int) -> SuiteOutcome:
    """Let lm-eval answer and score every row of a test file.

    Args:
        lm: made by `wrap`.
        file: json list in LLM-Adapters format, read by lm-eval itself.
        rows: the same file as we read it; what lm-eval scored is compared with it.
        scoring: picks the task file `llm_adapters_<scoring>`.
        max_new_tokens: limit of every continuation.

    Raises:
        UserError: `max_new_tokens` leaves no room for a prompt, or lm-eval scored other rows than `rows`.
    """
    # `evaluate` rather than `simple_evaluate`, which wraps it and starts pip and compilers (2 s) to describe the
    # machine in a result that we do not keep.
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    room = lm.max_length - max_new_tokens
    if room <= 0:
        raise UserError(
            f"max_new_tokens {max_new_tokens}: must be less than the model's context, {lm.max_length} tokens"
        )
    name = f"llm_adapters_{scoring}"
    # A temporary cache: no earlier file can be mistaken for this one, and the home folder stays clean.
    with tempfile.TemporaryDirectory(prefix="harness-eval-") as cache:
        overrides = {"dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": cache}}
        # The settings of a task from a file can be changed only through a group.
        loaded = TaskManager(include_path=str(TASKS), include_defaults=False).load(
            [{"group": "suite", "task": [{"task": name, **overrides}]}]
        )
        task = loaded["tasks"][name]
        # The reader guesses types: a column with only dates would come back as different text.
        if list(task.test_docs()) != list(rows):
            raise UserError(
                f"{file}: lm-eval reads other rows than the harness; write it as a json list of complete rows"
            )
        task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
        samples = evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0)["samples"][name]
    samples = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return SuiteOutcome(
        outcomes=tuple(_outcome(scoring, sample) for sample in samples),
        truncated_rows=sum(len(lm.tok_encode(evaluation_prompt(row["instruction"]))) > room for row in rows),
    )


def _outcome(scoring: Scoring, sample: dict[str, Any]) -> Outcome:
    return Outcome(
        correct=sample["acc"] == 1.0,
        prediction=extract(scoring, kept_text(sample["filtered_resps"][0])),
    )
