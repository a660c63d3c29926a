"""What a job takes of a machine: bounds that grow with the work, and lie above what such jobs were seen to take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness.records.atomic import write_json
from harness.study import needs
from harness.study.config import load_study
from harness.study.jobs import ModelJob
from harness.study.paths import Paths
from harness.study.plan import Plan, resolve_study
from harness.study.sources import HubModel, LocalModel
from house import ROOT


def plan_of(name: str) -> Plan:
    return resolve_study(load_study(ROOT / "config" / f"{name}.yaml", inputs_needed=False))


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


def test_the_embedded_study_asks_for_a_small_machine(paths: Paths) -> None:
    """Each of its runs took less than two minutes and 1 GB on one core."""
    plan = plan_of("embedded")
    for run in plan.runs.values():
        asked = needs.of_training(run.training, paths)
        assert 2_000 < asked.mem_mb < 10_000
        assert 2 < asked.minutes < 180
        assert asked.gpus == 0
    (model,) = plan.models.values()
    assert 440_000 < needs.parameters(model, paths) < 660_000
    assert needs.of_model(model, paths).gpus == 0


def test_a_search_takes_as_long_as_all_its_trials(paths: Paths) -> None:
    plan = plan_of("embedded")
    search = next(iter(plan.searches.values()))
    one = needs.of_training(search.training, paths).minutes * 60 - needs.START_S
    trials = len(search.search.grid) + search.search.max_extensions
    asked = needs.of_search(search, paths)
    assert asked.minutes * 60 - needs.START_S == pytest.approx(trials * one, rel=0.1)
    assert asked.mem_mb == needs.of_training(search.training, paths).mem_mb


def test_a_probe_takes_as_long_as_its_batches_and_holds_little_beside_the_weights(paths: Paths) -> None:
    job = next(iter(plan_of("importance").probes.values()))
    twice = job.model_copy(update={"probes": job.probes.model_copy(update={"batches": 2 * job.probes.batches})})
    one, two = (needs.of_probe(asked, paths) for asked in (job, twice))
    assert two.minutes * 60 - needs.START_S == pytest.approx(2 * (one.minutes * 60 - needs.START_S), rel=0.1)
    assert one.mem_mb * 1e6 > 4 * needs.parameters(job.model, paths)
    assert (one.gpus, needs.of_probe(job.model_copy(update={"device": "cuda"}), paths).gpus) == (0, 1)


def test_the_papers_runs_ask_for_a_gpu_and_room_for_moments_on_the_host(paths: Paths) -> None:
    plan = plan_of("paper")
    for name, run in plan.runs.items():
        training = run.training
        asked = needs.of_training(training, paths)
        assert asked.gpus == 1
        weights = needs.parameters(training.model, paths) * 2
        assert asked.mem_mb * 1e6 > 2 * weights
        score = needs.of_evaluation(plan.evals[plan.evaluation_of[name]], training, paths, batch_size=16)
        assert score.gpus == 1
        assert score.minutes > 15


def test_parameters_are_counted_or_taken_from_files_or_assumed(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRASS_NONE", raising=False)
    assert needs.parameters(_local("${GRASS_NONE}/model"), paths) == needs.UNKNOWN_PARAMETERS
    assert needs.parameters(_local(str(tmp_path / "gone")), paths) == needs.UNKNOWN_PARAMETERS
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert needs.parameters(_local(str(tmp_path)), paths) == 500

    hub = ModelJob(label="m", source=HubModel(kind="hub", repo="o/n", revision="0" * 40))
    assert needs.parameters(hub, paths) == needs.UNKNOWN_PARAMETERS
    origin = {
        "source_sha256": "0", "git_commit": None, "git_dirty": None, "packages": {}, "python": "3", "platform": "p",
        "device": "cpu", "threads": 1, "started_utc": "now", "input_sha256": {},
    }  # fmt: skip
    record = {"name": "m", "folder": "f", "files_sha256": {}, "parameters": 7, "wall_s": 1.0, "provenance": origin}
    write_json(paths.model(hub.name) / "manifest.json", record)
    assert needs.parameters(hub, paths) == 7


def _local(path: str) -> ModelJob:
    return ModelJob(label="m", source=LocalModel(kind="local", path=path))


def test_every_rule_has_a_log_that_its_stage_writes_and_says_what_it_takes() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    rules = re.split(r"^rule (?=\w+:)", text, flags=re.MULTILINE)[1:]
    assert len(rules) == 14
    for rule in rules:
        name = rule.partition(":")[0]
        assert f"results/logs/{name}/" in rule
        assert "--log {log}" in rule
        # both are paths of the user's, and may have spaces; all other paths are relative and made of labels
        assert '"{PYTHON:q} -m harness ' in rule or '"{HARNESS} ' in rule
        assert "{CONFIG}" not in rule
        assert "mem_mb=" in rule
        assert "runtime=" in rule
        assert ("gpu=" in rule) == (name in ("probe", "search", "train", "evaluate"))
