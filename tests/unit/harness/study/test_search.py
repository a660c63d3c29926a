"""What a trial of a learning-rate search trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.study.plan import resolve_study
from study_files import complaint, load


def test_a_trial_takes_a_share_of_the_steps_and_the_name_says_so(tmp_path: Path) -> None:
    """And without one a search keeps the name that it had."""
    whole, quarter = (
        resolve_study(load(tmp_path, ("max_extensions: ", f"{share}max_extensions: ")))
        for share in ("", "share: 0.25, ")
    )
    (one, *_), (other, *_) = whole.searches.values(), quarter.searches.values()
    assert one.trial == one.training == other.training
    recipe, shorter = other.training.recipe, other.trial.recipe
    assert (shorter.steps, shorter.warmup_steps) == (round(recipe.steps / 4), round(recipe.warmup_steps / 4))
    assert other.trial.recipe.model_copy(update={"steps": recipe.steps, "warmup_steps": recipe.warmup_steps}) == recipe
    assert one.name != other.name
    assert "share" not in one.search.model_dump()


@pytest.mark.parametrize("share", ["0.0", "1.5"])
def test_a_share_outside_its_range_is_refused(share: str, tmp_path: Path) -> None:
    said = complaint(tmp_path, ("max_extensions: ", f"share: {share}, max_extensions: "))
    assert "search.share: must be " in said


def test_a_share_of_few_steps_still_is_one(tmp_path: Path) -> None:
    (search, *_) = resolve_study(
        load(tmp_path, ("max_extensions: ", "share: 0.001, max_extensions: "))
    ).searches.values()
    assert (search.trial.recipe.steps, search.trial.recipe.warmup_steps) == (1, 0)
