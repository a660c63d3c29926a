"""Bytes and hours to come, by hand; and a study that cannot fit is told so, with both numbers and the mend."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.__main__ import main
from harness.records import atomic
from harness.records.units import GIB
from harness.study import disk, keep, needs
from harness.study.config import load_study
from harness.study.disk import jobs_at_once, to_come, too_little
from harness.study.hours import START_S, hours_to_come
from harness.study.jobs import EVALUATE, SEARCH, TRAIN
from harness.study.paths import Paths
from harness.study.plan import Plan, folder_bytes, outputs, resolve_study
from house import ROOT
from study_files import load, written


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "results")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return resolve_study(load(tmp_path))


def paper(tmp_path: Path, value: str | None) -> Plan:
    text = (ROOT / "config" / "paper.yaml").read_text(encoding="utf-8")
    if value is not None:
        assert text.count("runtime: {") == 1
        text = text.replace("runtime: {", f"runtime: {{keep: {value}, ")
    text = text.replace("published: config/", f"published: {ROOT}/config/")
    (tmp_path / "paper.yaml").write_text(text, encoding="utf-8")
    return resolve_study(load_study(tmp_path / "paper.yaml", inputs_needed=False))


# ------------------------------------------------------------ disk


def test_the_papers_study_by_hand(tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its models by their names, 30 % up: 1.43, 2.6 and 9.1 billion parameters; bf16 weights, fp32 moments."""
    monkeypatch.delenv("MIRROR", raising=False)
    billions = 1.43 + 2.6 + 9.1
    all_runs, last_runs = 2 * 13 * 3, 2 * 13
    state = 2 * 9.1e9 * (2 + 2 * 4)
    for value, runs in (("all", all_runs), ("last", last_runs), ("none", 0), (None, 0)):
        asked = to_come(paper(tmp_path, value), paths, jobs=1)
        assert asked.kept_models == 3 * runs
        assert asked.kept_bytes == pytest.approx(runs * billions * 1e9 * 2)
        assert asked.passing_bytes == pytest.approx(0 if value == "all" else 9.1e9 * 2)
        assert asked.state_bytes == pytest.approx(state)
        assert asked.fetched_bytes == pytest.approx(billions * 1e9 * 2)
        assert asked.peak_bytes == asked.kept_bytes + asked.passing_bytes + asked.state_bytes + asked.fetched_bytes
    assert to_come(paper(tmp_path, "all"), paths, jobs=1).kept_bytes / 1e12 == pytest.approx(2.05, abs=0.05)


def test_only_what_is_not_there_is_to_come(plan: Plan, paths: Paths) -> None:
    runs = keep.exporting(plan)
    model, state = (size(plan.runs[runs[0]].training, paths) for size in (needs.weight_bytes, needs.state_bytes))
    whole = to_come(plan, paths, jobs=2)
    assert (whole.kept_models, whole.kept_bytes, whole.state_bytes) == (6, 6 * model, 2 * 2 * state)
    atomic.write_json(paths.output(TRAIN, runs[0]), {})
    assert to_come(plan, paths, jobs=1).kept_bytes == 5 * model
    # resume state that lies there already is not to come again
    paths.state(runs[1]).mkdir(parents=True)
    (paths.state(runs[1]) / "step3.pt").write_bytes(bytes(100))
    assert to_come(plan, paths, jobs=1).state_bytes == 2 * state - 100
    # what snakemake will make, where that is known
    assert to_come(plan, paths, jobs=1, files=[paths.output(TRAIN, runs[0])]).kept_bytes == model
    assert to_come(plan, paths, jobs=1, files=[]).peak_bytes == 0


def test_adapters_have_less_to_save(plan: Plan, paths: Paths) -> None:
    by_method = {run.training.label: run.training for run in plan.runs.values()}
    full, lora = (needs.state_bytes(by_method[label], paths) for label in ("full", "lora"))
    assert lora == pytest.approx(needs.ADAPTER_SHARE * full, rel=0.01)
    assert full == needs.parameters(by_method["full"].model, paths) * (4 + 2 * 4)


def test_runs_at_once_follow_cores_gpus_and_nodes(plan: Plan, tmp_path: Path) -> None:
    assert [jobs_at_once(plan, cores=cores) for cores in (1, 3)] == [1, 3]
    assert jobs_at_once(paper(tmp_path, None), cores=64) == 1
    assert jobs_at_once(paper(tmp_path, None), nodes=8) == 8


def test_a_study_that_cannot_fit_is_one_line_with_both_numbers_and_the_mend(
    tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MIRROR", raising=False)
    told = {}
    for free in (3000, 400, 100):
        monkeypatch.setattr(disk, "free_bytes", lambda _, free=free: free * GIB)
        told[free] = too_little(paper(tmp_path, "all"), paths, jobs=1)
    assert told[3000] is None
    assert told[400] is not None
    assert "\n" not in told[400]
    assert told[400].startswith(
        "paper: too little disk: up to 2,101.6 GiB to come (234 exported models that stay 1,907.6"
    )
    assert (
        "and 400.0 GiB are free; runtime.keep: none makes it 210.9 GiB: set it in the config, or free some" in told[400]
    )
    assert told[100] is not None
    assert "runtime.keep: none makes it 210.9 GiB, still too much: free some under" in told[100]
    # where nothing is kept anyway, the mend does not name it
    last = too_little(paper(tmp_path, "none"), paths, jobs=1)
    assert last is not None
    assert "runtime.keep" not in last


def test_free_disk_is_that_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert disk.free_bytes(tmp_path / "not" / "yet") == pytest.approx(disk.free_bytes(tmp_path), rel=0.1)


def test_what_a_running_job_removes_meanwhile_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kept").write_bytes(b"1234")
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "nowhere")
    assert folder_bytes([tmp_path / "a", tmp_path / "a" / "kept", tmp_path / "gone"]) == 8


def test_the_size_in_a_name_is_an_upper_bound() -> None:
    names = {
        "meta-llama/Llama-2-7b-hf": 6_738_415_616,
        "google/gemma-2b": 2_506_172_416,
        "google/gemma-7b": 8_537_680_896,
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": 1_100_048_384,
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
        "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
        "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    }
    for name, true in names.items():
        bound = needs.parameters_in(name)
        assert bound is not None
        assert true <= bound < 1.6 * true, name
    # no size of the whole model: an active part, and none at all
    assert needs.parameters_in("Qwen/Qwen1.5-MoE-A2.7B") is None
    assert needs.parameters_in("7b-labs/phi") is None


# ------------------------------------------------------------ hours


def took(plan: Plan, paths: Paths, name: str, seconds: float) -> None:
    timing = {"load_s": 1.0, "prepare_s": None, "train_s": seconds - 1.0}
    atomic.write_json(paths.output(TRAIN, name), {"status": "ok", "timing": timing})


def test_without_finished_jobs_time_is_arithmetic(plan: Plan, paths: Paths) -> None:
    found = hours_to_come(plan, paths)
    trainings = sum(needs.of_training(run.training, paths, pace=needs.USUAL).seconds for run in plan.runs.values())
    jobs = [o for o in outputs(plan, paths) if o.kind in (TRAIN, SEARCH, EVALUATE)]
    assert (found.by_pace, found.by_arithmetic) == (0, len(jobs) + 1)  # and the model
    assert found.seconds > trainings + START_S * len(jobs)


def test_a_guess_is_below_what_a_cluster_is_asked_for(plan: Plan, paths: Paths) -> None:
    """A scheduler kills what takes longer than it asked for; `plan` says what it is likely to take."""
    for run in plan.runs.values():
        likely = needs.of_training(run.training, paths, pace=needs.USUAL).seconds
        assert likely < needs.of_training(run.training, paths).seconds / 5


def test_finished_jobs_set_the_pace_of_the_others_the_nearest_first(plan: Plan, paths: Paths) -> None:
    full, lora = ([n for n in plan.runs if f"--{label}--" in n] for label in ("full", "lora"))
    before = hours_to_come(plan, paths)
    one = needs.of_training(plan.runs[full[0]].training, paths, pace=needs.USUAL).seconds
    took(plan, paths, full[0], one / 10)
    took(plan, paths, lora[0], one / 2)
    found = hours_to_come(plan, paths)
    assert found.by_pace == 4 + 2, "four runs, and the searches of both methods"
    searches = len(plan.study.search.grid) if plan.study.search else 0
    done = 2 * (START_S + one)
    of_others = one * (1 + searches) * (0.1 + 0.5) + 2 * one * (0.1 + 0.5) / 2
    at_first = one * 2 * (1 + searches) + 2 * one
    assert found.seconds == pytest.approx(before.seconds - done - at_first + of_others)


def test_a_run_that_broke_off_sets_no_pace(plan: Plan, paths: Paths) -> None:
    atomic.write_json(paths.output(TRAIN, next(iter(plan.runs))), {"status": "oom", "timing": None})
    assert hours_to_come(plan, paths).by_pace == 0


def test_plan_prints_disk_and_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--config", str(written(tmp_path)), "--cores", "2"]) == 0
    out = capsys.readouterr().out
    assert "to come  up to 0.0 GiB of disk (6 exported models that stay 0.0 GiB, resume state, 2 runs at once" in out
    assert "by arithmetic of usual machines: a guess" in out
    monkeypatch.setattr(disk, "free_bytes", lambda _: 1)
    assert main(["plan", "--config", str(written(tmp_path)), "--cores", "2"]) == 0
    assert "too little disk: snakemake will refuse: up to 0.0 GiB to come (" in capsys.readouterr().out
