"""Tasks of lm-eval by name: data from a mirror folder, kept before training, scored without network or mirror."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from harness.errors import UserError
from harness.evaluating import stock_data
from harness.evaluating.lm import wrap
from harness.evaluating.stock import score_stock
from harness.evaluating.stock_data import fetch
from harness.inputs.tokenizer import build_tokenizer
from harness.study.jobs import SuiteJob
from lm_eval_mirror import ARC, GSM8K, ITEMS, mirror
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mirror(tmp_path_factory.mktemp("mirror"))


@pytest.fixture(autouse=True)
def mirrored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("MIRROR", str(folder))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def suite(task: str, **settings: Any) -> SuiteJob:
    return SuiteJob.model_validate({"label": "s", "source": {"kind": "lm-eval", "task": task} | settings})


def small_lm(*, positions: int = 600) -> Any:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=positions, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return wrap(LlamaForCausalLM(config).eval(), tokenizer, batch_size=8)


def test_a_task_is_scored_as_lm_eval_scores_it_from_what_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = fetch(suite("arc_easy", limit=5), tmp_path)
    assert record.rows == {"arc_easy": 5}
    assert {"tasks.json", "data/0/test/data-00000-of-00001.arrow"} <= set(record.files_sha256)
    assert json.loads((tmp_path / "tasks.json").read_text())["data"][0]["data_set"] == ARC
    monkeypatch.delenv("MIRROR")  # neither mirror nor network is needed any more
    lm = small_lm()
    found = score_stock(lm, suite("arc_easy", limit=5), tmp_path)
    assert [(score.metric, score.version, score.items, score.limited) for score in found.scores] == [
        ("acc", "1.0", 5, True), ("acc_norm", "1.0", 5, True),
    ]  # fmt: skip
    table = pd.DataFrame(found.documents)
    for score in found.scores:
        values = table.loc[table["metric"] == score.metric, "value"]
        assert len(values) == 5
        assert score.value == pytest.approx(values.mean())
        assert score.stderr == pytest.approx(values.std() / 5**0.5)
    # the same by hand: the likeliest continuation of lm-eval's own prompt
    tokenizer, model = lm.tokenizer, lm.model
    for item in range(5):
        prompt = f"Question: How many apples has Ann {item} 2?\nAnswer:"
        sums = []
        for n in range(4):
            ids = torch.tensor([tokenizer(f"{prompt} {item + n + 2} apples")["input_ids"]])
            start = len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                steps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            sums.append(float(steps.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        row = table[(table["metric"] == "acc") & (table["document"] == item)].iloc[0]
        assert [pair[0] for pair in json.loads(row["answers"])] == pytest.approx(sums, abs=1e-4)
        assert row["value"] == float(sums.index(max(sums)) == item % 4)


def test_shots_come_from_the_training_split_and_answers_are_written(tmp_path: Path) -> None:
    """A mirror without the data set's card: its folders are the configurations."""
    job = suite("gsm8k", num_fewshot=2, limit=3)
    record = fetch(job, tmp_path)
    assert record.rows == {"gsm8k": 3}
    found = score_stock(small_lm(), job, tmp_path)
    assert [(score.filter, score.num_fewshot) for score in found.scores] == [
        ("strict-match", 2), ("flexible-extract", 2),
    ]  # fmt: skip
    assert found.settings["first_question"].count("#### ") == 2
    assert found.settings["first_question"].endswith("Question: Ann has 0 pens and buys 1. How many now?\nAnswer:")
    assert found.settings["max_gen_toks_lowered"] == {}
    again = score_stock(small_lm(), job, tmp_path)
    assert again.settings["first_question"] == found.settings["first_question"]


def test_a_tag_is_all_its_tasks_and_shorter_contexts_get_shorter_answers(tmp_path: Path) -> None:
    record = fetch(suite("ai2_arc"), tmp_path / "tag")
    assert record.rows == {"arc_challenge": ITEMS, "arc_easy": ITEMS}
    found = score_stock(small_lm(), suite("ai2_arc"), tmp_path / "tag")
    assert [(score.task, score.metric, score.limited) for score in found.scores] == [
        (task, metric, False) for task in ("arc_challenge", "arc_easy") for metric in ("acc", "acc_norm")
    ]
    fetch(suite("gsm8k", num_fewshot=0, limit=2), tmp_path / "gsm8k")
    short = score_stock(small_lm(positions=300), suite("gsm8k", num_fewshot=0, limit=2), tmp_path / "gsm8k")
    assert short.settings["max_gen_toks_lowered"] == {"gsm8k": [256, 150]}


def test_what_would_fail_after_training_is_said_before(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=f"baber/piqa: not in MIRROR={folder}, and the hub cannot be reached"):
        fetch(suite("piqa"), tmp_path)
    # a name in lm-eval's files that is no task
    with pytest.raises(UserError, match="s: lm-eval has no task, group or tag 'scrolls'; nearest: scrolls_"):
        fetch(suite("scrolls"), tmp_path)
    with pytest.raises(UserError, match=r"lm-eval task arc_easy cannot be scored here: .*other `num_fewshot`"):
        fetch(suite("arc_easy", num_fewshot=ITEMS + 1), tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_a_copy_that_lacks_what_the_task_reads_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = mirror(tmp_path / "other")
    (other / GSM8K / "main" / "test-00000-of-00001.parquet").unlink()
    monkeypatch.setenv("MIRROR", str(other))
    with pytest.raises(UserError, match=r"lm-eval task gsm8k cannot be made: .*test"):
        fetch(suite("gsm8k"), tmp_path / "s")
    (other / GSM8K / "main" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=f"{other / GSM8K}: cannot be read as its task of lm-eval wants it"):
        fetch(suite("gsm8k"), tmp_path / "s")


def test_metrics_that_would_have_to_be_fetched_code_and_pictures_are_refused() -> None:
    task = SimpleNamespace(_metric_fn_list={"rouge": None}, config=SimpleNamespace(process_results=None))
    source = suite("x").source
    for changes, said in (
        ({}, "metric rouge comes from the library `evaluate`"),
        ({"UNSAFE_CODE": True}, "runs code that the model writes"),
        ({"MULTIMODAL": True}, "pictures or sounds"),
    ):
        loaded = {"tasks": {"t": SimpleNamespace(**vars(task), **changes)}}
        with pytest.raises(UserError, match=f"lm-eval task t: .*{said}"):
            stock_data._try(loaded, source)  # type: ignore[arg-type]


def test_a_chat_format_without_a_template_is_refused(tmp_path: Path) -> None:
    job = suite("arc_easy", limit=2, apply_chat_template=True)
    fetch(job, tmp_path)
    lm = small_lm()
    with pytest.raises(UserError, match="s: apply_chat_template: the model's tokenizer has no chat template"):
        score_stock(lm, job, tmp_path)
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {{ eos_token }} {% endfor %}"
    found = score_stock(lm, job, tmp_path)
    assert found.scores[0].chat_template
    assert found.settings["first_question"].startswith("Question: How many apples has Ann 0 2?\nAnswer:")
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match=r"'<\|im_end\|>' has id (\d+), and the model's embedding has \1 rows"):
        score_stock(lm, job, tmp_path)
