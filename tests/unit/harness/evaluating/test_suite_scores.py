"""One suite put to a model: predictions, likelihoods and held-out loss, row by row."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.errors import UserError
from harness.evaluating.asking import Asking
from harness.evaluating.heldout import heldout_loss
from harness.evaluating.lm import likelihood_suite, score_suite, wrap
from harness.inputs.generated import suite_rows
from harness.inputs.prompts import Prompt, Row, evaluation_prompt
from harness.inputs.tokenizer import build_tokenizer
from harness.inputs.tokens import encode
from harness.tasks.protocol import extract
from learned_rows import known_rows, learned, small_llama, write_suite
from transformers import AutoModelForCausalLM, AutoTokenizer

ASKING = Asking(prompt=Prompt("llm-adapters", build_tokenizer()))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return known_rows()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learned(tmp_path_factory.mktemp("run") / "checkpoint")


def loaded(checkpoint: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)


def test_batch_size_changes_no_prediction_and_no_loss(checkpoint: Path, rows: list[Row], tmp_path: Path) -> None:
    mixed = [*rows[:20], *suite_rows("choice", split="test", count=20, seed=1)]
    file = write_suite(tmp_path, mixed) / "test.json"
    predictions, losses = [], []
    for batch_size in (1, 7, 64):
        model, tokenizer = loaded(checkpoint)
        losses.append(
            heldout_loss(model, Prompt("llm-adapters", tokenizer), mixed, max_length=80, batch_size=batch_size)
        )
        lm = wrap(model, tokenizer, batch_size=batch_size)
        predictions.append(score_suite(lm, file=file, rows=mixed, scoring="answer", max_new_tokens=8, asking=ASKING))
    assert predictions[0] == predictions[1] == predictions[2]
    for other in losses[1:]:
        assert [d.tokens for d in other.documents] == [d.tokens for d in losses[0].documents]
        assert [d.loss for d in other.documents] == pytest.approx([d.loss for d in losses[0].documents], abs=1e-5)


def test_beams_are_searched_row_by_row_as_transformers_does(
    checkpoint: Path, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded(checkpoint)
    some = rows[:5]
    own = []
    for row in some:
        prompt = torch.tensor([ASKING.tokens(row)])
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_beams=4, do_sample=False, max_new_tokens=8,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        own.append(extract("answer", tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)))
    lm, seen = wrap(model, tokenizer, batch_size=64), []
    usual = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        seen.append((len(kwargs["input_ids"]), kwargs["num_beams"]))
        return usual(*args, **kwargs)

    monkeypatch.setattr(model, "generate", generate)
    file = write_suite(tmp_path, some) / "test.json"
    found = score_suite(lm, file=file, rows=some, scoring="answer", max_new_tokens=8, asking=ASKING, beams=4)
    assert [outcome.prediction for outcome in found.outcomes] == own
    assert seen == [(1, 4)] * 5
    assert lm.batch_size == 64


def test_heldout_loss_is_the_models_own_on_the_training_template(checkpoint: Path) -> None:
    model, tokenizer = loaded(checkpoint)
    tests = suite_rows("three-step", split="test", count=6, seed=1)
    found = heldout_loss(model, Prompt("llm-adapters", tokenizer), tests, max_length=80, batch_size=4)
    shortest = 80
    total = tokens = 0.0
    for row, document in zip(tests, found.documents, strict=True):
        encoded = encode(Prompt("llm-adapters", tokenizer), row, max_length=80, loss_on="answer")
        with torch.no_grad():
            own = float(model(input_ids=torch.tensor([encoded.input_ids]), labels=torch.tensor([encoded.labels])).loss)
        assert document.loss == pytest.approx(own, abs=1e-5)
        assert document.tokens == sum(label != -100 for label in encoded.labels)
        shortest = min(shortest, len(encoded.input_ids))
        total, tokens = total + own * document.tokens, tokens + document.tokens
    assert found.mean == pytest.approx(total / tokens, abs=1e-5)
    assert found.truncated_rows == 0
    assert heldout_loss(
        model, Prompt("llm-adapters", tokenizer), tests, max_length=shortest - 1, batch_size=4
    ).truncated_rows == len(tests)


def test_no_reference_output_means_no_loss_and_a_reason(checkpoint: Path, rows: list[Row]) -> None:
    model, tokenizer = loaded(checkpoint)
    empty = [Row(**{**row, "output": ""}) for row in rows[:3]]
    none = heldout_loss(model, Prompt("llm-adapters", tokenizer), empty, max_length=64, batch_size=4)
    assert (none.mean, none.tokens, none.why) == (None, 0, "no row has a reference output")
    some = heldout_loss(model, Prompt("llm-adapters", tokenizer), [*empty, rows[3]], max_length=64, batch_size=4)
    assert [document.loss is None for document in some.documents] == [True, True, True, False]
    assert some.mean == some.documents[3].loss
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    broken = heldout_loss(model, Prompt("llm-adapters", tokenizer), rows[:3], max_length=64, batch_size=4)
    assert (broken.mean, broken.why) == (None, "the model's loss is not finite")


def test_prompts_longer_than_the_context_are_counted(rows: list[Row], tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    mixed = [*rows[:4], *suite_rows("choice", split="test", count=4, seed=1)]
    lengths = sorted(len(tokenizer(evaluation_prompt(row["instruction"]))["input_ids"]) for row in mixed)
    cut = sum(length > lengths[3] for length in lengths)
    lm = wrap(small_llama(tokenizer, positions=lengths[3] + 8).eval(), tokenizer, batch_size=3)
    file = write_suite(tmp_path, mixed) / "test.json"
    assert (
        score_suite(lm, file=file, rows=mixed, scoring="answer", max_new_tokens=8, asking=ASKING).truncated_rows
        == cut
        > 0
    )
    with pytest.raises(UserError, match="max_new_tokens 999"):
        score_suite(lm, file=file, rows=mixed, scoring="answer", max_new_tokens=999, asking=ASKING)


def test_likelihoods_are_those_of_the_model(tmp_path: Path, checkpoint: Path, rows: list[Row]) -> None:
    """Summed log-probability of prompt and answer in one piece, the prompt's taken off."""
    model, tokenizer = loaded(checkpoint)
    lm = wrap(model, tokenizer, batch_size=4)
    file = write_suite(tmp_path, rows[:5]) / "test.json"
    found = likelihood_suite(lm, file=file, rows=rows[:5], choices="labels", asking=ASKING)

    def likelihood(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            steps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return float(steps.gather(1, ids[0, 1:, None]).sum())

    for row, outcome in zip(rows, found.outcomes, strict=False):
        prompt = evaluation_prompt(row["instruction"])
        labels = [f"answer{n}" for n in range(1, 5)]
        best = max(labels, key=lambda label: likelihood(f"{prompt}the correct answer is {label}"))
        assert (outcome.prediction, outcome.correct) == (best, best == row["answer"])


def scripted(continuations: dict[str, str]) -> tuple[Any, list[tuple[str, dict[str, Any]]]]:
    """An lm-eval model that answers each prompt from a list, and the requests it was sent."""
    from lm_eval.api.model import LM

    seen: list[tuple[str, dict[str, Any]]] = []

    class Scripted(LM):
        max_length = 10_000

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            seen.extend(request.args for request in requests)
            return [continuations[request.args[0]] for request in requests]

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

        def ask(self, tokens: Any, **settings: Any) -> None:
            pass

    return Scripted(), seen


@pytest.mark.parametrize(
    ("scoring", "gold", "right", "wrong", "unparsed"),
    [
        ("number", "1234.0", " 7 or\n\n1,234.", "1,234 of 8", "many"),
        ("letter", "B", "Because", "an E", "b"),
        ("true_false", "true", "untrue", "false or true", "True"),
        ("solution", "solution2", "solution2 solution1", "solution1", "solution3"),
        ("answer", "answer5", "answer5", "answer1 or answer5", "answer6"),
        ("ending", "ending4", "ending4", "ending3", "ending5"),
        ("option", "option2", "option2\n\n### Response:\noption1", "option1", "option"),
    ],
)
def test_every_task_file_asks_and_scores_as_the_protocol_says(
    tmp_path: Path, scoring: Any, gold: str, right: str, wrong: str, unparsed: str
) -> None:
    texts = [wrong, right, unparsed, right]
    tests = [Row(instruction=f"Question {i}: 2026-11-2{i}?", input="", output="", answer=gold) for i in range(4)]
    prompts = [evaluation_prompt(row["instruction"]) for row in tests]
    lm, seen = scripted(dict(zip(prompts, texts, strict=True)))
    file = write_suite(tmp_path, tests) / "test.json"
    found = score_suite(lm, file=file, rows=tests, scoring=scoring, max_new_tokens=13, asking=ASKING)
    assert [outcome.correct for outcome in found.outcomes] == [False, True, False, True]
    assert [outcome.prediction is None for outcome in found.outcomes] == [False, False, True, False]
    assert [prompt for prompt, _ in seen] == prompts
    assert all(
        settings == {"until": [], "do_sample": False, "num_beams": 1, "max_gen_toks": 13} for _, settings in seen
    )


def test_a_changed_file_at_the_same_path_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "test.json"
    for answer in ("6", "7"):
        tests = [Row(instruction=f"What is {answer}?", input="", output="", answer=answer)]
        write_suite(tmp_path, tests)
        os.utime(file, (1e9, 1e9))
        lm, _ = scripted({evaluation_prompt(tests[0]["instruction"]): answer})
        assert (
            score_suite(lm, file=file, rows=tests, scoring="number", max_new_tokens=4, asking=ASKING)
            .outcomes[0]
            .correct
        )
    dates = [Row(instruction="2026-11-21", input="", output="", answer="1")]
    write_suite(tmp_path, dates)
    with pytest.raises(UserError, match="other rows"):
        score_suite(lm, file=file, rows=dates, scoring="number", max_new_tokens=4, asking=ASKING)
