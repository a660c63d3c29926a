"""A study made small: the same methods, tasks, tables and claims, in a few steps on a few rows.

What a long study can fail on late (a method that refuses its options, a suite that cannot be read, a figure without
values) is met in minutes. Its numbers say nothing about any method.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from baselines import find_method
from harness.study.sources import HubModel, LocalModel, ModelSource
from harness.study.spec import Study

ENDING = "-rehearsal"
_IN_STEPS = re.compile(r"_(every|steps|gap)$|^period$")
"""Options of methods that count optimizer steps, or batches of a probe."""
_RANK = 8
"""Most of what a method projects to: stand-ins are narrow, and a rank above their width would be refused."""
_OBSERVED_ROWS = 4
_GRID_EXTENSIONS = 1


@dataclass(frozen=True)
class Cut:
    """How small a study is made; what is smaller already stays as it is."""

    steps: int
    """Optimizer steps of a run; at least 4 draws of layers, updates of a projection and the like fall into them."""
    train_rows: int
    items: int
    """Test items of each suite."""
    seeds: int
    new_tokens: int
    """Tokens that a model may write for each item."""
    batch_size: int
    device: Literal["cpu", "cuda"]

    @property
    def period(self) -> int:
        """Most steps between two draws of a method."""
        return max(1, self.steps // 4)


def rehearsal_of(study: Study, cut: Cut, *, models: Path) -> dict[str, Any]:
    """The study's file as a mapping, made small; models of the hub are to be taken from a mirror, see `stand_in_of`.

    Args:
        study: as loaded.
        cut: the sizes.
        models: folder in which the stand-ins of models from local folders stand, each by its label.
    """
    made = study.model_dump(mode="json", exclude_unset=True)
    made["study"] = study.study + ENDING
    made["title"] = f"Rehearsal of {study.study}: stand-ins, not results"
    made["notes"] = [_note(study, cut), *made.get("notes", [])]
    made["seeds"] = made["seeds"][: cut.seeds]
    for label, source in study.models.items():
        if isinstance(source, LocalModel):
            made["models"][label]["path"] = str(models / label)
    made["recipe"] = {**_recipe(made["recipe"], cut), "device": cut.device}
    for entry in made["tasks"].values():
        entry["train"] = _rows(entry["train"], cut)
        entry["recipe"] = _recipe(entry.get("recipe", {}), cut)
        entry["suites"] = {label: _suite(suite, cut) for label, suite in entry.get("suites", {}).items()}
    if study.forgetting:
        made["forgetting"] = {label: _suite(suite, cut) for label, suite in made["forgetting"].items()}
    for entry in made["methods"].values():
        entry["options"] = _options(entry["module"], entry.get("options", {}), cut)
        entry["recipe"] = _recipe(entry.get("recipe", {}), cut)
        if entry.get("seeds"):
            entry["seeds"] = entry["seeds"][: cut.seeds]
        entry.pop("gpus", None)
    if study.search is not None:
        made["search"]["max_extensions"] = min(study.search.max_extensions, _GRID_EXTENSIONS)
    made["observation"] = _smaller(made["observation"], every_steps=cut.period, rows=_OBSERVED_ROWS)
    if study.probes is not None:
        made["probes"] = _smaller(made["probes"], rows=_OBSERVED_ROWS)
    made["runtime"] = {**made.get("runtime", {}), "threads": 1, "gpus": 1, "checkpoint_every_steps": cut.period}
    return made


def stand_in_of(source: ModelSource, label: str, *, mirror: Path, models: Path) -> Path | None:
    """Folder of the stand-in of one of the study's models; None for a model that the study pretrains itself."""
    if isinstance(source, HubModel):
        return mirror / source.repo
    return models / label if isinstance(source, LocalModel) else None


def _note(study: Study, cut: Cut) -> str:
    return (
        f"A rehearsal of {study.study}: random models of its architectures, {cut.steps} steps, {cut.items} items a "
        "suite. It shows that every step of the way can be gone; no number in it says anything about a method."
    )


def _smaller(block: dict[str, Any], **most: int) -> dict[str, Any]:
    """`block` with each key that it has at most as large as given."""
    return block | {key: min(block[key], limit) for key, limit in most.items() if block.get(key) is not None}


def _recipe(recipe: dict[str, Any], cut: Cut) -> dict[str, Any]:
    # a batch of two micro-batches, so that accumulation is gone through
    micro = max(1, cut.batch_size // 2)
    made = _smaller(recipe, steps=cut.steps, warmup_steps=cut.period, batch_size=cut.batch_size, micro_batch_size=micro)
    made.pop("device", None)
    return made


def _rows(train: dict[str, Any], cut: Cut) -> dict[str, Any]:
    return _smaller(
        {"train_rows": cut.train_rows} | train, train_rows=cut.train_rows, validation_rows=_OBSERVED_ROWS * 2
    )


def _suite(suite: dict[str, Any], cut: Cut) -> dict[str, Any]:
    counted = "rows" if suite["kind"] == "generated" else "limit"
    return _smaller({counted: cut.items} | suite, **{counted: cut.items}, max_new_tokens=cut.new_tokens)


def _options(module: str, given: dict[str, Any], cut: Cut) -> dict[str, Any]:
    """A method's options with short periods and low ranks, also where its own defaults are large, or follow the run."""
    fields = find_method(module).Config.model_fields
    defaults = {name: field.default for name, field in fields.items() if _IN_STEPS.search(name)}
    periods = {
        name: min(cut.period, value) if isinstance(value := given.get(name, default), int) else cut.period
        for name, default in defaults.items()
    }
    made = given | periods
    rank = given.get("rank", fields["rank"].default if "rank" in fields else None)
    if isinstance(rank, int) and rank > _RANK:
        made["rank"] = _RANK
        if isinstance(alpha := given.get("alpha"), int | float):  # updates are scaled by alpha over rank
            made["alpha"] = type(alpha)(alpha * _RANK / rank)
    return made
