"""A study made small is a study with the same methods, tasks and tables, whose every length is bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.study.config import load_study, recipe_of
from harness.study.rehearsal import Cut, rehearsal_of, stand_in_of
from harness.study.sources import HubModel, LmEvalSuite, LocalModel, PretrainedHere
from harness.study.spec import Study

ROOT = Path(__file__).resolve().parents[4]
CUT = Cut(steps=12, train_rows=64, items=4, seeds=2, new_tokens=16, batch_size=4, device="cpu")
STUDIES = [file.stem for file in sorted((ROOT / "config").glob("*.yaml")) if "numerics:" not in file.read_text()]


@pytest.fixture(params=STUDIES)
def both(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, Study]:
    """One of the project's studies, and what is read of its rehearsal's file."""
    monkeypatch.chdir(ROOT)
    study = load_study(ROOT / "config" / f"{request.param}.yaml", inputs_needed=False)
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(rehearsal_of(study, CUT, models=tmp_path / "models"), sort_keys=False))
    return study, load_study(file, inputs_needed=False)


def test_nothing_of_a_study_is_left_out(both: tuple[Study, Study]) -> None:
    study, small = both
    assert small.study == f"{study.study}-rehearsal"
    for part in ("models", "tasks", "methods", "forgetting", "comparisons", "views"):
        assert getattr(small, part).keys() == getattr(study, part).keys(), part
    for task, entry in study.tasks.items():
        assert small.tasks[task].suites.keys() == entry.suites.keys()
        assert small.tasks[task].prompt == entry.prompt
    for label, entry in study.methods.items():
        assert small.methods[label].module == entry.module
        assert small.methods[label].shots == entry.shots
        assert small.methods[label].recipe.keys() == entry.recipe.keys() - {"device"}
    assert small.views == study.views
    assert small.question == study.question
    assert (small.published, small.claims) == (study.published, study.claims)
    assert (small.search is None, small.probes is None) == (study.search is None, study.probes is None)
    if study.search is not None and small.search is not None:
        assert small.search.grid == study.search.grid


def test_every_length_is_bounded(both: tuple[Study, Study]) -> None:
    _, small = both
    assert len(small.seeds) <= CUT.seeds
    for task, entry in small.tasks.items():
        assert entry.train.train_rows is not None
        assert entry.train.train_rows <= CUT.train_rows
        for suite in [*entry.suites.values(), *small.forgetting.values()]:
            made: Any = suite
            assert (made.rows if suite.kind == "generated" else made.limit) <= CUT.items
            if not isinstance(suite, LmEvalSuite) and made.max_new_tokens is not None:
                assert made.max_new_tokens <= CUT.new_tokens
        for label in small.methods:
            recipe = recipe_of(small, task, label)
            assert recipe.steps <= CUT.steps
            assert recipe.device == CUT.device
            assert recipe.batch_size <= CUT.batch_size


def test_every_method_draws_several_times(both: tuple[Study, Study]) -> None:
    _, small = both
    for entry in small.methods.values():
        for name, value in entry.options.items():
            if name in ("sample_every", "refresh_every", "update_gap", "period", "measure_every", "probe_every"):
                assert value is not None
                assert value <= CUT.steps // 4, (entry.module, name)


def test_ranks_fit_narrow_models_and_adapters_keep_their_scale(both: tuple[Study, Study]) -> None:
    study, small = both
    for label, entry in small.methods.items():
        before = study.methods[label].options
        if "rank" in entry.options:
            assert entry.options["rank"] <= 8
            if "alpha" in before:
                assert entry.options["alpha"] / entry.options["rank"] == before["alpha"] / before.get("rank", 8)


def test_a_stand_in_stands_where_its_model_is_looked_for() -> None:
    folders = {"mirror": Path("m"), "models": Path("l")}
    hub, here = HubModel(kind="hub", repo="org/name", revision="main"), LocalModel(kind="local", path="x")
    assert stand_in_of(hub, "a", **folders) == Path("m/org/name")
    assert stand_in_of(here, "a", **folders) == Path("l/a")
    own = PretrainedHere.model_construct(kind="pretrain")
    assert stand_in_of(own, "a", **folders) is None
