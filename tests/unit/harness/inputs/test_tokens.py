"""Template, tokenizer, labels and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.errors import UserError
from harness.inputs.generated import Variant, fact, story, suite_rows
from harness.inputs.prompts import Prompt, Row, evaluation_prompt, training_prompt
from harness.inputs.rows import read_rows
from harness.inputs.tokenizer import build_tokenizer
from harness.inputs.tokens import IGNORED, Encoded, collate, encode, encode_rows
from house import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with the real files is not here")
VARIANTS: tuple[Variant, ...] = ("two-step", "three-step", "choice")
WORDS = build_tokenizer()
PROMPT = Prompt("llm-adapters", WORDS)


def row(instruction: str = "Ann has 3 apples, finds 5. How many now?", output: str = "3 + 5 = 8.") -> Row:
    return Row(instruction=instruction, input="", output=output, answer="8")


def labelled(row: Encoded) -> list[int]:
    return [label for label in row.labels if label != IGNORED]


def test_the_two_templates_are_the_published_strings() -> None:
    s16 = " " * 16
    task = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert training_prompt("Add.") == "\n".join(
        [f"{task}  ", "", f"{s16}### Instruction:", f"{s16}Add.", s16, f"{s16}### Response:", s16]
    )
    assert evaluation_prompt("Add.") == "\n".join(
        [f"{task} ", "", f"{s16}### Instruction:", f"{s16}Add.", "", f"{s16}### Response:", s16]
    )


def test_generated_text_has_no_unknown_word_and_both_templates_tokenize_alike() -> None:
    for variant in VARIANTS:
        for each in suite_rows(variant, split="train", count=500, seed=1):
            ids = WORDS(training_prompt(each["instruction"]) + each["output"])["input_ids"]
            assert WORDS.unk_token_id not in ids
            prompt = WORDS(training_prompt(each["instruction"]))["input_ids"]
            assert prompt == WORDS(evaluation_prompt(each["instruction"]))["input_ids"] == ids[: len(prompt)]
    rng = np.random.default_rng(0)
    text = " ".join(fact(rng) + " " + story(rng) for _ in range(500))
    assert WORDS.unk_token_id not in WORDS(text)["input_ids"]


def test_the_template_costs_four_tokens() -> None:
    assert len(WORDS(training_prompt(""))["input_ids"]) == 4


def test_decoded_text_suits_the_extraction_rules() -> None:
    ids = WORDS("10 + 7 = 17. 17 - 9 = 8.")["input_ids"]
    assert WORDS.decode(ids, skip_special_tokens=True) == "10 + 7 = 17 . 17 - 9 = 8 ."
    ids = WORDS(evaluation_prompt("x") + "the correct answer is answer3")["input_ids"]
    assert (
        WORDS.decode(ids, skip_special_tokens=True).split("### Response:")[1].strip() == "the correct answer is answer3"
    )


def test_the_tokenizer_survives_saving(tmp_path: Path) -> None:
    WORDS.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = training_prompt("Ann has 3 apples, finds 5. How many now?") + "3 + 5 = 8."
    assert loaded(text)["input_ids"] == WORDS(text)["input_ids"]
    assert (loaded.pad_token_id, loaded.padding_side, loaded.decode([1, 2])) == (0, "left", "<s> </s>")


@settings(deadline=None)
@given(st.sampled_from(VARIANTS), st.integers(0, 10_000))
def test_labels_cover_exactly_the_answer_and_the_end(variant: Variant, seed: int) -> None:
    each = suite_rows(variant, split="train", count=1, seed=seed)[0]
    encoded = encode(PROMPT, each, max_length=96, loss_on="answer")
    answer = WORDS(each["output"], add_special_tokens=False)["input_ids"]
    assert labelled(encoded) == [*answer, WORDS.eos_token_id]
    assert encoded.labels[-len(answer) - 1 :] == encoded.input_ids[-len(answer) - 1 :]
    assert not encoded.truncated


def test_loss_on_all_labels_every_token() -> None:
    encoded = encode(PROMPT, row(), max_length=96, loss_on="all")
    assert encoded.labels == encoded.input_ids


def test_a_row_that_fills_the_length_has_no_end_token() -> None:
    whole = encode(PROMPT, row(), max_length=96, loss_on="answer")
    length = len(whole.input_ids)
    assert encode(PROMPT, row(), max_length=length, loss_on="answer") == whole
    cut = encode(PROMPT, row(), max_length=length - 1, loss_on="answer")
    assert (cut.input_ids, cut.truncated) == (whole.input_ids[:-1], True)


def test_rows_without_an_answer_token_are_dropped_and_counted() -> None:
    short, long = row(), row(instruction="Ann has 3 apples. " * 20)
    for loss_on in ("answer", "all"):
        kept, use = encode_rows(PROMPT, [short, long], max_length=24, loss_on=loss_on)  # type: ignore[arg-type]
        assert (len(kept), use.train_rows, use.dropped_rows, use.truncated_rows) == (1, 1, 1, 0)
        assert use.mean_tokens == len(kept[0].input_ids)
        assert use.answer_tokens_share == pytest.approx(7 / len(kept[0].input_ids))


def test_if_no_row_is_left_the_error_says_what_to_raise() -> None:
    with pytest.raises(UserError, match=r"max_length 5: no answer token is left in any of 1 rows.*has 13 tokens"):
        encode_rows(PROMPT, [row()], max_length=5, loss_on="answer")


def test_tokenizers_without_offsets_or_end_are_refused() -> None:
    class Slow:
        is_fast = False
        eos_token_id = 2

    class Endless:
        is_fast = True
        eos_token_id = None

    with pytest.raises(UserError, match="no character offsets"):
        encode(Prompt("llm-adapters", Slow()), row(), max_length=8, loss_on="answer")
    with pytest.raises(UserError, match="no end token"):
        encode(Prompt("llm-adapters", Endless()), row(), max_length=8, loss_on="answer")


def test_batches_are_padded_on_the_right_outside_mask_and_loss() -> None:
    batch = collate([Encoded([1, 5, 2], [-100, 5, 2], False), Encoded([1, 2], [-100, 2], False)], 0)
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 2], [-100, 2, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@needs_shared
@pytest.mark.parametrize("name", ["openbookqa", "boolq", "ARC-Easy"])
@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_real_rows_are_encoded_with_a_real_tokenizer(name: str, loss_on: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    rows = read_rows(SHARED / "data" / "llm-adapters" / "dataset" / name / "test.json")[:100]
    kept, use = encode_rows(Prompt("llm-adapters", tokenizer), rows, max_length=512, loss_on=loss_on)
    assert use.dropped_rows + len(kept) == 100
    assert kept[0].input_ids[0] == tokenizer.bos_token_id
    whole = [e for e in kept if not e.truncated]
    assert whole
    assert all(e.input_ids[-1] == tokenizer.eos_token_id for e in whole)
    if loss_on == "answer":
        # the first answer token may carry the template's last space: it is labelled all the same
        assert {tokenizer.decode(labelled(e), skip_special_tokens=True).strip() for e in whole} <= {
            r["output"] for r in rows
        }


@needs_shared
def test_a_token_across_the_border_belongs_to_the_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    encoded = encode(Prompt("llm-adapters", tokenizer), row(output="the end"), max_length=512, loss_on="answer")
    template_alone = len(tokenizer(training_prompt(row()["instruction"]))["input_ids"])
    first = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
    assert tokenizer.decode(encoded.labels[first:-1]).strip() == "the end"
    assert first <= template_alone, "the published count never starts the answer earlier"


@needs_shared
def test_gsm8k_rows_are_cut_at_the_length_the_papers_use() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    rows = read_rows(SHARED / "data" / "gsm8k" / "train.jsonl")[:50]
    kept, use = encode_rows(Prompt("llm-adapters", tokenizer), rows, max_length=256, loss_on="answer")
    assert max(len(e.input_ids) for e in kept) <= 256
    assert use.truncated_rows == sum(e.truncated for e in kept) > 0
