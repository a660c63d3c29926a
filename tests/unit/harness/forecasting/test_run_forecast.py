"""A run on a GPU waits for a forecast of its own memory; one that cannot fit is a row, and never starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.__main__ import main
from harness.checking.tiny import LR, tiny_inputs, tiny_training
from harness.forecasting.run_forecast import forecast_run, refusal
from harness.records import atomic
from harness.records.code import code_of, run_forecast
from harness.records.inputs import ModelRecord
from harness.records.provenance import provenance
from harness.records.reading import read
from harness.records.run import RunForecast
from harness.study.config import load_study
from harness.study.identity import files_of
from harness.study.jobs import FORECAST, MODEL, ForecastJob, Training
from harness.study.paths import Paths
from harness.study.plan import outputs, resolve_study
from harness.training.loading import Inputs
from harness.training.loop import train
from house import ROOT


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


def forecast_of(inputs: Inputs, training: Training) -> RunForecast:
    return forecast_run(training, name="fit", model=inputs.model, rows=inputs.rows)


def test_only_runs_that_train_on_a_gpu_wait_for_a_forecast_and_seeds_share_it() -> None:
    for name, device in (("paper", "cuda"), ("embedded", "cpu")):
        plan = resolve_study(load_study(ROOT / "config" / f"{name}.yaml", inputs_needed=False))
        assert {run.training.recipe.device for run in plan.runs.values()} == {device}
        trained = [run.training for run in plan.runs.values() if run.training.module != "base"]
        assert len(trained) < len(plan.runs)
        assert set(plan.forecasts) == {ForecastJob(training=t).name for t in trained if device == "cuda"}
        files = [o.path for o in outputs(plan, Paths()) if o.kind is FORECAST]
        assert files == [Path("results/forecasts") / name / "forecast.json" for name in plan.forecasts]
        assert len(files) < len(plan.runs)


def test_gradients_that_wait_for_the_second_micro_batch_are_counted(inputs: Inputs) -> None:
    whole = forecast_of(inputs, tiny_training("full", {}, batch_size=8, micro_batch_size=4))
    alone = forecast_of(inputs, tiny_training("full", {}, batch_size=4, micro_batch_size=4))
    four = forecast_of(inputs, tiny_training("full", {}, batch_size=16, micro_batch_size=4))
    assert whole.peak_bytes is not None
    assert alone.peak_bytes is not None
    assert whole.peak_bytes > alone.peak_bytes
    assert four.peak_bytes == whole.peak_bytes


def test_rows_are_taken_as_long_as_the_longest_of_them(inputs: Inputs) -> None:
    long = forecast_of(inputs, tiny_training("full", {}, max_length=96))
    short = forecast_of(inputs, tiny_training("full", {}, max_length=20))
    assert (short.longest_row_tokens, long.longest_row_tokens > 20) == (20, True)
    assert (short.peak_bytes or 0) < (long.peak_bytes or 0)


def test_a_run_in_autocast_is_forecast_in_autocast(inputs: Inputs) -> None:
    plain, rounded = (forecast_of(inputs, tiny_training("full", {}, compute_dtype=dtype)) for dtype in (None, "bf16"))
    assert plain.peak_bytes != rounded.peak_bytes


def test_what_cannot_be_forecast_has_its_reason_and_is_not_refused(inputs: Inputs) -> None:
    record = forecast_of(inputs, tiny_training("lisa", {"active_layers": 9}))
    assert (record.peak_bytes, record.peak_why) == (None, "active_layers 9 is above the model's 4 layers")
    assert refusal(record, 1) is None


def test_a_run_that_cannot_fit_is_a_row_with_the_numbers_and_takes_no_step(inputs: Inputs) -> None:
    training = tiny_training("full", {})
    record = forecast_of(inputs, training)
    assert record.needed_bytes is not None
    assert refusal(record, record.needed_bytes) is None
    why = refusal(record, record.needed_bytes - 1)
    assert why is not None
    assert why.startswith("cannot fit its GPU: the forecast of a step is 0.00 GiB, in ")
    options = {"name": "run", "lr": LR, "lr_searched": False, "seed": 0, "inputs": inputs, "folder": None}
    run = train(training, **options, refusal=why)
    assert (run.status, run.status_why, run.steps_done) == ("skipped", why, 0)


def test_the_stage_writes_the_forecast_of_a_spec_beside_it(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, paths = ForecastJob(training=tiny_training("lora", {"rank": 2, "alpha": 4})), Paths(tmp_path)
    manifest = ModelRecord(
        name="tiny", folder=str(inputs.model), parameters=None, wall_s=0.0,
        files_sha256={file.name: atomic.sha256(file) for file in files_of(inputs.model)},
        provenance=provenance(roots=(), inputs={}),
    )  # fmt: skip
    atomic.write_json(paths.output(MODEL, job.training.model.name), manifest.model_dump(mode="json"))
    paths.rows(job.training.rows.name).parent.mkdir(parents=True)
    paths.rows(job.training.rows.name).symlink_to(inputs.rows)
    spec = paths.spec(FORECAST, job.name)
    atomic.write_json(spec, job.body())
    assert main(["forecast", "--spec", str(spec)]) == 0
    assert f"forecast {job.name}: 0.00 GiB" in capsys.readouterr().err
    record = read(spec.parent / "forecast.json", RunForecast)
    alone = forecast_of(inputs, job.training)
    assert (record.name, record.peak_bytes, record.needed_bytes) == (job.name, alone.peak_bytes, alone.needed_bytes)
    assert record.provenance.source_sha256 == code_of(run_forecast("lora")).sha256


def test_the_stage_wants_a_step_or_a_spec(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--model", "tiny", "--spec", "spec.json"]):
        with pytest.raises(SystemExit) as left:
            main(["forecast", *words])
        assert left.value.code == 2
    assert main(["forecast", "--model", "tiny"]) == 2
    assert "--method is needed beside --model" in capsys.readouterr().err
