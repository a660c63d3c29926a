"""Accuracy of one suite through lm-eval, with our own task files and without any default of the checkpoint.

Two protocols that are never mixed: the model writes an answer that a rule of the llm-adapters protocol reads, or the
likeliest of the allowed answers is taken and nothing is written.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.evaluating.asking import Asking
from harness.inputs.choices import question
from harness.inputs.prompts import Row
from harness.step.architecture import attention_of, positions_of
from harness.study.sources import Choices, Scoring
from harness.tasks.protocol import extract, kept_text

TASKS = Path(__file__).parents[1] / "tasks"

DEVIATIONS = (
    "greedy decoding, where a suite does not ask for beams; published: beam search with 4 beams",
    "batches, left-padded (greedy decoding alone), with attention mask; published: one row at a time and no mask",
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
    """Answer extracted from the continuation, or the likeliest; None if the scoring rule found none."""
    correct_normalised: bool | None = None
    """The same for the answer that is likeliest per character; None where the model writes its answer."""


@dataclass(frozen=True, kw_only=True)
class SuiteOutcome:
    """All rows of one suite, in the order of its file."""

    outcomes: tuple[Outcome, ...]
    truncated_rows: int
    """Rows that exceed the model's context, the answer included: the beginning of their prompt was cut off."""


def wrap(model: Any, tokenizer: Any, *, batch_size: int) -> Any:
    """An lm-eval model around a loaded model, so that the model is loaded only once for all suites of a run.

    Replaces the model's generation configuration: fields left unset in a call are filled from it, and checkpoints bring
    their own sampling, repetition penalties and end tokens.

    Raises:
        UserError: the tokenizer has no end token.
    """
    import datasets
    from transformers import GenerationConfig

    from harness.evaluating.model import HarnessLM

    # lm-eval's warnings (a model object instead of a name, cut prompts) are expected here, or counted by us.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no end token; set eos_token in its config")
    # lm-eval reads the context from the configuration, which may name more positions than the model has
    lm = HarnessLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=positions_of(model))
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=lm.tokenizer.pad_token_id,
    )
    return lm


def protocol(asking: Asking, *, choices: Choices | None = None, beams: int = 1) -> str:
    """The name that scores stand under; numbers of different protocols are not comparable.

    Args:
        asking: prompt and worked examples.
        choices: of a suite scored by likelihood.
        beams: of a suite whose answers are written.
    """
    if choices == "texts":
        return "likelihood of the options' texts, asked as stock lm-eval does"
    prompt, decoded = asking.prompt.name, "greedy" if beams == 1 else f"{beams} beams"
    shots = f", {len(asking.examples)}-shot" if asking.examples else ""
    if choices == "labels":
        return f"likelihood of the labels (prompt {prompt}{shots})"
    if prompt == "llm-adapters":
        return f"llm-adapters ({decoded}{shots})"
    return f"answers written to prompt {prompt}, read as in llm-adapters ({decoded}{shots})"


def decoding(lm: Any, asking: Asking) -> dict[str, Any]:
    """Every setting that is the same for all suites of a task, for the record."""
    return {
        "protocol": protocol(asking),
        "deviations": list(DEVIATIONS),
        **asking.record(),
        "do_sample": False,
        "num_beams": 1,
        "bos_token_id": lm.tokenizer.bos_token_id,
        "eos_token_id": lm.tokenizer.eos_token_id,
        "pad_token_id": lm.tokenizer.pad_token_id,
        "padding_side": "left",
        "attention_mask": True,
        "key_value_cache": True,
        "batch_size": lm.batch_size,
        "max_context_tokens": lm.max_length,
        "attention": attention_of(lm.model).kind,
        "weight_dtype": str(lm.model.dtype).removeprefix("torch."),
        "lm_eval": version("lm_eval"),
    }


def score_suite(
    lm: Any, *, file: Path, rows: Sequence[Row], scoring: Scoring, max_new_tokens: int, asking: Asking, beams: int = 1
) -> SuiteOutcome:
    """Let lm-eval answer and score every row of a test file.

    Args:
        lm: made by `wrap`.
        file: json list in LLM-Adapters format, read by lm-eval itself.
        rows: the same file as we read it; what lm-eval scored is compared with it.
        scoring: picks the task file `llm_adapters_<scoring>`.
        max_new_tokens: limit of every continuation.
        asking: the prompt, and worked examples before it.
        beams: 1 decodes greedily; with more, rows are answered one by one.

    Raises:
        UserError: `max_new_tokens` leaves no room for a prompt, or lm-eval scored other rows than `rows`.
    """
    room = lm.max_length - max_new_tokens
    if room <= 0:
        raise UserError(
            f"max_new_tokens {max_new_tokens}: must be less than the model's context, {lm.max_length} tokens"
        )
    prompts = [asking.tokens(row) for row in rows]
    _announce(lm, asking, rows, prompts)
    generation: dict[str, Any] = {"max_gen_toks": max_new_tokens, "until": asking.stops}
    if beams > 1:
        generation["num_beams"] = beams
    with _one_by_one(lm) if beams > 1 else nullcontext():
        samples = _evaluated(
            lm,
            f"llm_adapters_{scoring}",
            file,
            rows,
            {"doc_to_text": lambda row: asking.text(row)},
            generation_kwargs=generation,
        )
    return SuiteOutcome(
        outcomes=tuple(
            Outcome(correct=sample["acc"] == 1.0, prediction=extract(scoring, kept_text(sample["filtered_resps"][0])))
            for sample in samples
        ),
        truncated_rows=sum(len(prompt) > room for prompt in prompts),
    )


@contextmanager
def _one_by_one(lm: Any) -> Iterator[None]:
    """Answer one row at a time inside the block."""
    usual, lm.batch_size_per_gpu = lm.batch_size_per_gpu, 1
    try:
        yield
    finally:
        lm.batch_size_per_gpu = usual


def likelihood_suite(lm: Any, *, file: Path, rows: Sequence[Row], choices: Choices, asking: Asking) -> SuiteOutcome:
    """Let lm-eval find the likeliest of each row's allowed answers.

    Args:
        lm: made by `wrap`.
        file: as for `score_suite`.
        rows: as for `score_suite`; each has options, see `harness.inputs.choices`.
        choices: `labels` are asked for by `asking`, `texts` as stock lm-eval does, without worked examples.
        asking: the prompt, and worked examples before it.

    Raises:
        UserError: lm-eval scored other rows than `rows`.
    """
    found = [question(row, choices) for row in rows]
    if choices == "labels":
        prompts = [asking.tokens(row) for row in rows]
        _announce(lm, asking, rows, prompts)
        delimiter = asking.delimiter(rows[0])
    else:
        lm.ask_as_lm_eval()
        prompts = [lm.tok_encode(one.text) for one in found]
        delimiter = " "
    overrides = {
        "doc_to_text": lambda row: question(row, choices).text or asking.text(row),
        "doc_to_choice": lambda row: list(question(row, choices).answers),
        "doc_to_target": lambda row: question(row, choices).gold,
        "target_delimiter": delimiter,
    }
    samples = _evaluated(lm, "choices", file, rows, overrides)
    longest = [
        len(prompt)
        + max(len(lm.tok_encode(f"{delimiter}{answer}", add_special_tokens=False)) for answer in one.answers)
        for prompt, one in zip(prompts, found, strict=True)
    ]
    return SuiteOutcome(
        outcomes=tuple(
            Outcome(
                correct=sample["acc"] == 1.0,
                prediction=one.labels[int(np.argmax([likelihood for likelihood, _ in sample["filtered_resps"]]))],
                correct_normalised=sample["acc_norm"] == 1.0,
            )
            for one, sample in zip(found, samples, strict=True)
        ),
        truncated_rows=sum(tokens > lm.max_length + 1 for tokens in longest),
    )


def _announce(lm: Any, asking: Asking, rows: Sequence[Row], prompts: Sequence[list[int]]) -> None:
    tokens = {asking.text(row): prompt for row, prompt in zip(rows, prompts, strict=True)}
    lm.ask(tokens, stops=asking.stops, in_turns=asking.prompt.name == "chat")


def _evaluated(
    lm: Any, name: str, file: Path, rows: Sequence[Row], overrides: dict[str, Any], **settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """What lm-eval logged of each row, in their order, under one of our task files with some keys overridden."""
    # not `simple_evaluate`, which starts pip and compilers (2 s) to describe the machine in a result we do not keep
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    # A temporary cache: no earlier file can be mistaken for this one, and the home folder stays clean.
    with tempfile.TemporaryDirectory(prefix="harness-eval-") as cache:
        data = {"dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": cache}}
        # The settings of a task from a file can be changed only through a group.
        loaded = TaskManager(include_path=str(TASKS), include_defaults=False).load(
            [{"group": "suite", "task": [{"task": name, **data, **overrides}]}]
        )
        task = loaded["tasks"][name]
        # The reader guesses types: a column with only dates would come back as different text.
        if list(task.test_docs()) != list(rows):
            raise UserError(
                f"{file}: lm-eval reads other rows than the harness; write it as a json list of complete rows"
            )
        for key, value in settings.items():
            task.set_config(key, value, update=True)
        samples = evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0)["samples"][name]
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))
