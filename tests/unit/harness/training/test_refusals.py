"""Models that a method cannot take are rows with a reason; stacks of unequal layers are taken as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from further import a_few
from harness.checking.contract import Case, export_is_what_was_trained
from harness.checking.tiny import tiny_inputs, tiny_training
from harness.forecasting.run_forecast import forecast_run
from harness.inputs.tokenizer import build_tokenizer
from harness.records.run import TrainRecord
from harness.study.jobs import SearchJob
from harness.study.spec import Search
from harness.training.loading import Inputs
from harness.training.search import search

from baselines.full import Full

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def jamba() -> Any:
    """Mamba and attention layers by turns, which differ in size and in the names of their modules."""
    from transformers import JambaConfig, JambaForCausalLM

    return JambaForCausalLM(JambaConfig(
        vocab_size=len(build_tokenizer()), use_mamba_kernels=False, mamba_d_state=4, attn_layer_period=2,
        attn_layer_offset=1, num_experts=1, **SHAPE,
    ))  # fmt: skip


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(vocab_size=len(build_tokenizer()), num_local_experts=4, **SHAPE))


def inputs_with(model: Any, folder: Path) -> Inputs:
    inputs = tiny_inputs(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model().save_pretrained(inputs.model)
    return inputs


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return inputs_with(jamba, tmp_path_factory.mktemp("jamba"))


@pytest.mark.parametrize(
    ("module", "options"),
    a_few(
        [
            ("grass", {"active_layers": 2, "sample_every": 3, "sampler": "fixed"}),
            ("lisa", {"active_layers": 2, "sample_every": 3, "state": "reset"}),
            ("ows", {"active_layers": 2, "sample_every": 4, "calibration_rows": 8}),
            ("badam", {"sample_every": 2}),
            ("dora", {"rank": 4, "alpha": 8, "targets": ("q_proj", "v_proj")}),
        ],
        one_in=4,
    ),
)
def test_sound_runs_on_layers_of_unequal_size_are_ok(module: str, options: Any, hybrid: Inputs, tmp_path: Path) -> None:
    record = Case(module, options, hybrid, tmp_path).standard()
    assert (record.status, record.status_why) == ("ok", None)


def test_adapters_that_the_model_never_uses_are_named(hybrid: Inputs, tmp_path: Path) -> None:
    """A Mamba layer multiplies with the weight of `dt_proj` and does not call the module."""
    record = Case("lora", {"rank": 4, "alpha": 8}, hybrid, tmp_path).standard()
    assert record.status == "disengaged"
    assert "no gradient reached base_model.model.model.layers.0.mamba.dt_proj.lora_A" in str(record.status_why)


def trained(inputs: Inputs, folder: Path, module: str, options: Any) -> TrainRecord:
    return Case(module, options, inputs, folder).standard()


def test_what_peft_refuses_is_a_skipped_row_in_runs_searches_and_forecasts(tmp_path: Path) -> None:
    inputs, why = inputs_with(mixtral, tmp_path), "lora.ParamWrapper does not work with use_dora=True."
    options = {"rank": 4, "alpha": 8}
    record = trained(inputs, tmp_path / "run", "dora", options)
    assert (record.status, record.status_why) == ("skipped", why)
    training = tiny_training("dora", options)
    job = SearchJob(training=training, search=Search(grid=(1e-3, 1e-2, 1e-1), seeds=(1,), max_extensions=0))
    found = search(job, inputs=inputs, trials_folder=tmp_path / "trials")
    assert {(trial.status, trial.status_why) for trial in found.trials} == {("skipped", why)}
    assert found.lr is None
    forecast = forecast_run(training, name="fit", model=inputs.model, rows=inputs.rows)
    assert (forecast.peak_bytes, forecast.peak_why) == (None, why)


@pytest.mark.parametrize(("error", "skips"), [(ValueError, True), (NotImplementedError, True), (AttributeError, False)])
def test_a_refusal_is_a_reason_and_a_fault_is_not(
    error: type[Exception], skips: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise error("no such layer\nand more")

    monkeypatch.setattr(Full, "attach", refuses)
    inputs = tiny_inputs(tmp_path)
    if skips:
        assert trained(inputs, tmp_path, "full", {}).status_why == "no such layer"
    else:
        with pytest.raises(error):
            trained(inputs, tmp_path, "full", {})


ON_THE_ENDS = {"rank": 4, "alpha": 8, "targets": ("q_proj", "embed_tokens", "lm_head")}


@pytest.mark.parametrize("module", ["lora", "dora"])
def test_adapters_on_embedding_and_head_count_in_their_groups(module: str, tmp_path: Path) -> None:
    case = Case(module, ON_THE_ENDS, tiny_inputs(tmp_path), tmp_path)
    record = case.standard()
    assert (record.status, record.status_why) == ("ok", None)
    assert next(c.promised for c in record.engagement if "groups" in c.name) == "embedding, head"
    assert export_is_what_was_trained(case) is None


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_on_tied_ends_are_refused(target: str, tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path, "gemma")
    record = trained(inputs, tmp_path, "lora", {"rank": 4, "alpha": 8, "targets": ("q_proj", target)})
    assert record.status == "skipped"
    assert "head is tied to its embedding" in str(record.status_why)


def capped() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(vocab_size=len(build_tokenizer()), head_dim=8, **SHAPE))


def test_a_loss_in_chunks_of_capped_logits_is_refused_before_the_first_step(tmp_path: Path) -> None:
    inputs = inputs_with(capped, tmp_path)
    training = tiny_training("full", {}, chunked_loss=True)
    job = SearchJob(training=training, search=Search(grid=(1e-3, 1e-2, 1e-1), seeds=(1,), max_extensions=0))
    found = search(job, inputs=inputs, trials_folder=tmp_path / "trials")
    (said,) = {(trial.status, trial.status_why) for trial in found.trials}
    assert said[0] == "skipped"
    assert "changes its logits after the head" in str(said[1])
    forecast = forecast_run(training, name="x", model=inputs.model, rows=inputs.rows)
    assert forecast.peak_bytes is None
    assert "changes its logits after the head" in str(forecast.peak_why)
