"""Models made, found, refused, loaded and counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.errors import UserError
from harness.inputs.make_models import make_model
from harness.inputs.models import load_model, load_tokenizer
from harness.inputs.pretrain import batches, make_pretrained
from harness.inputs.tokenizer import build_tokenizer
from harness.records.inputs import ModelRecord
from harness.records.reading import read
from harness.step.facts import facts_of
from harness.study.jobs import ModelJob
from harness.study.paths import resolve
from harness.study.sources import Corpus, LocalModel, PretrainedHere
from house import SHARED

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with the real model is not here")
CORPUS = Corpus(one_step_share=0.3, fact_share=0.8, guess_share=0.5)


def tiny(**changes: Any) -> ModelJob:
    source = PretrainedHere(
        kind="pretrain",
        layers=2,
        width=16,
        heads=2,
        feed_forward=24,
        corpus=CORPUS,
        steps=20,
        rows=4,
        length=24,
        lr=1e-2,
        seed=0,
    )
    return ModelJob(label="tiny", source=source.model_copy(update=changes))


def test_a_pretrained_model_loads_with_plain_transformers_and_says_how_it_learnt(tmp_path: Path) -> None:
    record = make_pretrained(tiny(), tmp_path / "m")
    assert read(tmp_path / "m" / "manifest.json", ModelRecord) == record
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(record.files_sha256)
    assert [step for step, _ in record.pretraining_loss] == list(range(2, 21, 2))
    assert record.pretraining_loss[-1][1] < record.pretraining_loss[0][1]
    model = load_model(resolve(record.folder), weight_dtype="fp32")
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert record.parameters == sum(p.numel() for p in model.parameters())
    tokenizer = load_tokenizer(resolve(record.folder))
    assert tokenizer.pad_token_id == 0


def test_pretraining_repeats_itself_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = make_pretrained(tiny(), tmp_path / "a")
    assert torch.rand(1) == expected
    again, other = make_pretrained(tiny(), tmp_path / "b"), make_pretrained(tiny(seed=1), tmp_path / "c")
    weights = "model.safetensors"
    assert first.files_sha256[weights] == again.files_sha256[weights] != other.files_sha256[weights]


def test_every_pretraining_row_starts_a_piece_and_is_full() -> None:
    tokenizer = build_tokenizer()
    batch = next(batches(CORPUS, tokenizer, rows=16, length=48, seed=0))
    assert batch.shape == (16, 48)
    assert (batch[:, 0] == tokenizer.bos_token_id).all()
    assert not (batch == tokenizer.pad_token_id).any()
    assert not (batch == tokenizer.unk_token_id).any()


def test_facts_count_every_parameter_once(tmp_path: Path) -> None:
    model = load_model(resolve(make_pretrained(tiny(), tmp_path / "m").folder), weight_dtype="bf16")
    facts = facts_of(model)
    assert facts.total_parameters == sum(p.numel() for p in model.parameters())
    assert facts.layer_parameters == (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16,) * 2
    assert facts.embedding_parameters == facts.head_parameters == 16 * len(build_tokenizer())
    assert (facts.final_norm_parameters, facts.hidden_size, facts.tied_embeddings) == (16, 16, False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def local(path: str) -> ModelJob:
    return ModelJob(label="local", source=LocalModel(kind="local", path=path))


@needs_shared
def test_a_local_model_stays_where_it_is_and_keeps_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRASS_MODELS", str(SHARED / "models"))
    record = make_model(local("${GRASS_MODELS}/stories260K"), tmp_path / "m")
    assert record.folder == "${GRASS_MODELS}/stories260K"
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"manifest.json", "stamps.json"}
    facts = facts_of(load_model(resolve(record.folder), weight_dtype="fp32"))
    assert (facts.layers, facts.tied_embeddings, facts.head_parameters) == (5, True, 0)
    assert record.parameters == facts.total_parameters
    assert load_tokenizer(resolve(record.folder)).pad_token_id == 0


@needs_shared
def test_a_tokenizer_without_pad_takes_unknown_then_end(tmp_path: Path) -> None:
    shutil.copytree(SHARED / "models" / "stories260K", tmp_path / "m", copy_function=shutil.copyfile)
    config = tmp_path / "m" / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    special = tmp_path / "m" / "special_tokens_map.json"
    special.unlink(missing_ok=True)
    settings.pop("pad_token", None)
    config.write_text(json.dumps(settings), encoding="utf-8")
    assert load_tokenizer(tmp_path / "m").pad_token == "<unk>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ([], "no config.json in it"),
        (["config.json"], "no tokenizer in it"),
        (["config.json", "tokenizer.json"], "no weights in it"),
    ],
)
def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path, files: list[str] | None, message: str) -> None:
    folder = tmp_path / "given"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        make_model(local(str(folder)), tmp_path / "m")
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    index = {"weight_map": {k: f"model-0000{k}-of-00002.safetensors" for k in "12"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"1 of 2 shards missing, first model-00002-of-00002\.safetensors"):
        make_model(local(str(tmp_path)), tmp_path / "m")
