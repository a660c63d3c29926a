"""Runs of models as people bring them: other attention, ids and positions, and another model put behind a path."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.checking.tiny import LR, tiny_inputs, tiny_training
from harness.inputs.models import load_model
from harness.inputs.tokenizer import build_tokenizer
from harness.records.run import TrainRecord
from harness.study.jobs import SearchJob
from harness.study.spec import Search
from harness.training.loading import Inputs
from harness.training.loop import train
from harness.training.search import search
from safetensors.torch import load_file
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from baselines.full import Full
from baselines.method import StepFacts

STEPS = 6


def notes(record: TrainRecord) -> list[str]:
    """What a run noted, but for the other work of the machine that the tests run on."""
    return [note for note in record.notes if not note.startswith("speed is void")]


def trained(inputs: Inputs, folder: Path, module: str = "full", **recipe: Any) -> TrainRecord:
    return train(
        tiny_training(module, {}, steps=STEPS, **recipe), name="run", lr=None if module == "base" else LR,
        lr_searched=False, seed=0, inputs=inputs, folder=folder, state_folder=folder / "state", checkpoint_every=2,
    )  # fmt: skip


def bloom(folder: Path) -> Inputs:
    inputs = tiny_inputs(folder)
    config = BloomConfig(vocab_size=len(build_tokenizer()), hidden_size=32, n_layer=4, n_head=4)
    BloomForCausalLM(config).save_pretrained(inputs.model)
    return inputs


@pytest.mark.parametrize("module", ["full", "base"])
def test_a_model_without_sdpa_trains_with_eager_attention_and_says_so(tmp_path: Path, module: str) -> None:
    record = trained(bloom(tmp_path), tmp_path / "run", module)
    assert (record.status, record.attention) == ("ok", "eager")
    assert record.attention_why == "BloomForCausalLM has no SDPA"
    assert record.checkpoint is not None
    load_model(Path(record.checkpoint), weight_dtype="fp32")


def test_a_model_with_sdpa_says_that(tmp_path: Path) -> None:
    record = trained(tiny_inputs(tmp_path), tmp_path / "run", "base")
    assert (record.attention, record.attention_why, notes(record)) == ("sdpa", None, [])
    assert {"model config.json", "model model.safetensors", "model tokenizer.json"} < set(
        record.provenance.input_sha256
    )


def test_a_generation_config_that_cannot_be_saved_costs_no_run(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    settings = json.dumps({"temperature": 0.9, "top_p": 0.6})
    (inputs.model / "generation_config.json").write_text(settings, encoding="utf-8")
    record = trained(inputs, tmp_path / "run")
    assert record.status == "ok"
    assert record.notes[0].startswith(
        "generation_config.json is refused by transformers, and replaced by a neutral one"
    )
    exported = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text(encoding="utf-8"))
    assert "temperature" not in exported


def test_a_pad_token_outside_the_embedding_costs_no_run_and_no_figure(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    usual = trained(inputs, tmp_path / "usual")
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(inputs.model)
    padded = trained(inputs, tmp_path / "padded")
    assert (padded.status, padded.validation_loss) == ("ok", usual.validation_loss)


def test_more_tokens_than_positions_are_a_row_with_both_numbers_before_the_first_step(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    config = GPT2Config(vocab_size=len(build_tokenizer()), n_embd=32, n_layer=4, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(inputs.model)
    record = trained(inputs, tmp_path / "run")
    assert (record.status, record.steps_done) == ("skipped", 0)
    assert record.status_why == "recipe.max_length is 96, and GPT2LMHeadModel has 64 positions: lower it"
    assert trained(inputs, tmp_path / "shorter", max_length=64).status == "ok"


# ------------------------------------------------------------ what a killed run leaves belongs to its model


class KilledError(Exception):
    """Stands for a killed process."""


def killed(inputs: Inputs, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in its fifth step, with a resume state after the fourth."""
    usual = Full.end_step
    done: list[int] = []

    def dies(self: Full, replay: Any) -> StepFacts:
        if len(done) == 4:
            raise KilledError
        done.append(1)
        return usual(self, replay)

    with monkeypatch.context() as patched:
        patched.setattr(Full, "end_step", dies)
        with pytest.raises(KilledError):
            trained(inputs, folder)
    assert (folder / "state" / "step4.pt").is_file()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_resume_state_is_not_put_onto_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = replace(tiny_inputs(tmp_path / "a"), made_from={"model model.safetensors": "1", "rows train.json": "3"})
    other = replace(first, made_from=first.made_from | {"model model.safetensors": "2"})
    straight = trained(first, tmp_path / "straight")
    for inputs, name in ((first, "same"), (other, "other")):
        killed(first, tmp_path / name, monkeypatch)
        record = trained(inputs, tmp_path / name)
        assert record.status == "ok"
        if inputs is first:
            assert notes(record) == ["resumed after step 4"]
        else:
            assert notes(record) == ["a resume state was dropped: it was made from another model model.safetensors"]
        assert record.steps_done == straight.steps_done
        found, wanted = weights(tmp_path / name), weights(tmp_path / "straight")
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_resume_state_that_says_nothing_of_its_model_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny_inputs(tmp_path / "a")
    killed(inputs, tmp_path / "run", monkeypatch)
    (tmp_path / "run" / "state" / "made_from.json").unlink()
    assert trained(inputs, tmp_path / "run").notes[0].startswith("a resume state was dropped: ")


def test_trials_of_another_model_are_made_again(tmp_path: Path) -> None:
    inputs = replace(tiny_inputs(tmp_path / "a"), made_from={"model config.json": "1"})
    grid = Search(grid=(1e-3, 2e-3, 4e-3), seeds=(7,), max_extensions=0)
    job = SearchJob(training=tiny_training("full", {}, steps=3), search=grid)
    folder = tmp_path / "trials"
    search(job, inputs=inputs, trials_folder=folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("lr*.json")}
    assert len(times) == 3
    record = search(job, inputs=inputs, trials_folder=folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("lr*.json")} == times
    assert "model model.safetensors" in record.provenance.input_sha256
    search(job, inputs=replace(inputs, made_from={"model config.json": "2"}), trials_folder=folder)
    assert all(path.stat().st_mtime_ns > times[path.name] for path in folder.glob("lr*.json"))
