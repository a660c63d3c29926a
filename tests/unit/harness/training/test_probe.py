"""A probe of an untrained model: its norms are those of plain gradients, and bad input ends in a sentence or a row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.checking.tiny import FAMILIES, LAYERS, RECIPE, tiny_inputs, tiny_training
from harness.errors import UserError
from harness.inputs.models import load_model, load_tokenizer
from harness.inputs.prompts import Prompt
from harness.inputs.rows import read_rows
from harness.inputs.tokens import encode_rows
from harness.records.atomic import write_json
from harness.records.columns import NORMS
from harness.records.run import ProbeRecord
from harness.study.jobs import ProbeJob
from harness.study.spec import Probes
from harness.training.batches import Batches, CalibrationBatches
from harness.training.loading import Inputs
from harness.training.probe import kinds_of, probe
from safetensors.torch import load_file, save_file
from torch import nn

from grass import Grass
from grass.layers import find_layers


@pytest.fixture(scope="module", params=FAMILIES)
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"), request.param)


def job(batches: int = 5, rows: int = 3, **recipe: Any) -> ProbeJob:
    training = tiny_training("base", {}, **recipe)
    settings = ("max_length", "loss_on", "weight_dtype", "compute_dtype", "device")
    return ProbeJob(
        model=training.model,
        rows=training.rows,
        probes=Probes(batches=batches, rows=rows),
        **{key: getattr(training.recipe, key) for key in settings},
    )


def calibration(inputs: Inputs, rows: int) -> CalibrationBatches:
    tokenizer = load_tokenizer(inputs.model)
    rows_read, prompt = read_rows(inputs.rows / "train.json"), Prompt("llm-adapters", tokenizer)
    encoded, _ = encode_rows(prompt, rows_read, max_length=RECIPE["max_length"], loss_on="answer")
    pad = {"pad_id": tokenizer.pad_token_id, "device": "cpu"}
    return CalibrationBatches(Batches(encoded, batch_size=rows, micro_batch_size=rows, seed=0, **pad))


def plain_rms(parameters: list[nn.Parameter]) -> float:
    square = sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None)
    return math.sqrt(square / sum(p.numel() for p in parameters))


def test_norms_are_those_of_plain_gradients_for_each_batch_and_block(inputs: Inputs) -> None:
    record = probe(job(), inputs)
    assert (record.status, record.status_why) == ("ok", None)
    model, batches = load_model(inputs.model, weight_dtype="fp32"), calibration(inputs, 3)
    layers = find_layers(model).layers
    assert len(record.batches) == 5
    for seen, batch in zip(record.batches, batches.batches(5), strict=True):
        model.zero_grad()
        loss = batches.loss(model, batch)
        loss.backward()
        assert seen.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert seen.tokens == int(batch["attention_mask"].sum())
        assert seen.gradient_rms == pytest.approx([plain_rms(list(layer.parameters())) for layer in layers], rel=1e-4)
        for kind, norms in seen.gradient_rms_by_kind.items():
            assert norms == pytest.approx([plain_rms(kinds_of(layer)[kind]) for layer in layers], rel=1e-4)


def test_the_mean_over_batches_is_the_importance_that_grass_starts_from(inputs: Inputs) -> None:
    record = probe(job(), inputs)
    batches = calibration(inputs, 3)
    optimizer = Grass(load_model(inputs.model, weight_dtype="fp32"), lr=1e-3, active_layers=1)
    optimizer.probe(batches.batches(5), batches.loss)
    assert optimizer.importance is not None
    columns = zip(*(batch.gradient_rms for batch in record.batches), strict=True)
    means = [sum(r for r in column if r is not None) / 5 for column in columns]
    assert means == pytest.approx(optimizer.importance.values, rel=1e-5)


def test_every_parameter_of_a_layer_is_in_one_kind(inputs: Inputs) -> None:
    record = probe(job(batches=4), inputs)
    for layer in find_layers(load_model(inputs.model, weight_dtype="fp32")).layers:
        kinds = kinds_of(layer)
        assert sorted(id(p) for own in kinds.values() for p in own) == sorted(id(p) for p in layer.parameters())
        assert all(p.dim() == 1 for p in kinds[NORMS])
        assert len(kinds) == 3
    assert record.layer_parameters is not None
    assert record.parameters_by_kind is not None
    by_layer = zip(*record.parameters_by_kind.values(), strict=True)
    assert [sum(sizes) for sizes in by_layer] == record.layer_parameters


def test_autocast_over_fp32_weights_is_near_and_not_the_same(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    plain, cast = (probe(job(compute_dtype=dtype), inputs).batches for dtype in ("fp32", "bf16"))
    for one, other in zip(plain, cast, strict=True):
        assert other.gradient_rms != one.gradient_rms
        assert other.gradient_rms == pytest.approx(one.gradient_rms, rel=0.1)


def test_a_probe_repeats_itself_and_reads_back(inputs: Inputs) -> None:
    first, second = probe(job(), inputs), probe(job(), inputs)
    assert first.batches == second.batches
    assert ProbeRecord.model_validate_json(first.model_dump_json()) == first
    assert {"train rows", "model model.safetensors"} <= first.provenance.input_sha256.keys()


def test_too_few_rows_are_a_sentence_with_both_numbers(inputs: Inputs) -> None:
    with pytest.raises(UserError, match=r"20 batches of 4 rows are 80 rows, but task rows has 64 training rows"):
        probe(job(batches=20, rows=4), inputs)


def test_more_tokens_than_learned_positions_are_a_record_with_both_numbers(tmp_path: Path) -> None:
    record = probe(job(max_length=200), tiny_inputs(tmp_path, "gpt2"))
    assert record.status == "skipped"
    assert record.status_why is not None
    assert "200" in record.status_why
    assert "128" in record.status_why


def test_a_token_without_a_row_of_the_embedding_is_a_sentence(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    tokenizer = load_tokenizer(inputs.model)
    tokenizer.add_tokens(["plus"])
    tokenizer.save_pretrained(inputs.model)
    rows = [{**row, "output": f"plus {row['output']}"} for row in read_rows(inputs.rows / "train.json")]
    write_json(inputs.rows / "train.json", rows)
    with pytest.raises(UserError, match=r"the token 'plus' has id \d+, and the model's embedding has \d+ rows"):
        probe(job(), inputs)


def test_a_norm_that_is_not_finite_is_a_record_with_its_reason(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    weights = load_file(inputs.model / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, inputs.model / "model.safetensors", metadata={"format": "pt"})
    record = probe(job(), inputs)
    assert record.status == "diverged"
    assert record.status_why is not None
    assert "in batch 0: loss nan, gradient norm nan of layer 0" in record.status_why
    (batch,) = record.batches
    assert batch.loss is None
    assert batch.gradient_rms == [None] * LAYERS
