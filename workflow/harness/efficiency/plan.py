"""Which cells are measured, in which order: what the targets need comes first, and a time budget cuts the end off.

Methods that are compared are one group. Its repeats are interleaved (every method once, then every method again), so
that a drift of clocks or temperature meets all of them alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from harness.efficiency.record import Block, Named
from harness.errors import UserError
from harness.records.device import DeviceKind
from harness.step.spec import Cell, EfficiencyStudy, Shape, cell_of

ANCHOR: dict[DeviceKind, str] = {"cuda": "llama-2-7b", "cpu": "tiny"}
"""The model that is measured in every way. A CPU rehearses on the tiny one alone."""
COMPARED = ("lora", "grass", "grass-decoder", "full", "lisa", "lisa-keep", "dora")
CORNERS = (("plain", "1x1024"), ("lean", "1x1024"), ("lean", "4x1024"))
"""(settings, shape) of the targets."""
OFFLOAD_CORNER = ("lean", "4x1024")
RESIDENT = "offload=resident"
MORE_LAYERS = "active_layers=4"
MIDDLE_MODELS = ("gemma-2b", "tinyllama-1.1b")
LENGTHS = (1792, 256, 4096, 512, 2048)
"""Tokens of one row, 1024 being in the corners; 1792 is the published one. Memory alone is measured there."""
LATE_MODELS = ("llama-3.1-8b", "qwen3-8b")


@dataclass(frozen=True)
class Entry:
    """A cell with its labels."""

    named: Named
    cell: Cell

    @property
    def words(self) -> str:
        """What `--only` is matched with."""
        named = self.named
        return f"{named.model}/{named.label}/{named.settings}/{named.shape}"


@dataclass(frozen=True)
class Group:
    """Cells that are compared with one another: one model, settings and shape."""

    entries: tuple[Entry, ...]
    timed: bool


@dataclass(frozen=True)
class Unit:
    """One block of one cell: what is measured, and may be lost, at a time."""

    entry: Entry
    do: Literal["memory", "timing"]
    repeat: int = 0

    @property
    def block(self) -> Block:
        """The block of the record that it fills."""
        return self.do


def plan(study: EfficiencyStudy, device: DeviceKind, only: Sequence[str] = ()) -> list[Group]:
    """All groups in the order of their priority; labels that the study lacks are left out.

    Args:
        study: with its models, methods, settings and shapes.
        device: a CPU measures the tiny model alone.
        only: see `select`.
    """
    groups: list[Group] = []
    seen: set[str] = set()
    for request in _asked(study, ANCHOR[device], rehearsal=device == "cpu"):
        new = tuple(entry for entry in _entries(study, *request.cells) if entry.named.name not in seen)
        seen.update(entry.named.name for entry in new)
        if new:
            groups.append(Group(new, timed=request.timed))
    return select(groups, only)


def every_group(study: EfficiencyStudy) -> list[Group]:
    """The cells of a GPU's plan, then those that only a rehearsal has."""
    groups = plan(study, "cuda")
    known = {entry.named.name for group in groups for entry in group.entries}
    if ANCHOR["cpu"] in study.models:
        for group in plan(study, "cpu"):
            more = tuple(entry for entry in group.entries if entry.named.name not in known)
            if more:
                groups.append(Group(more, group.timed))
    return groups


def select(groups: Iterable[Group], only: Sequence[str]) -> list[Group]:
    """The groups with those cells alone that a glob matches; all of them where there is no glob.

    Args:
        groups: to choose from.
        only: globs for model/method/settings/shape, a method's variant behind a plus.

    Raises:
        UserError: a glob that no cell matches.
    """
    groups = list(groups)
    for glob in only:
        if not any(fnmatchcase(entry.words, glob) for group in groups for entry in group.entries):
            raise UserError(f"--only {glob}: {_amiss(glob, [e.words for group in groups for e in group.entries])}")
    kept = [
        Group(tuple(e for e in group.entries if not only or any(fnmatchcase(e.words, g) for g in only)), group.timed)
        for group in groups
    ]
    return [group for group in kept if group.entries]


def _amiss(glob: str, words: Sequence[str]) -> str:
    """What of a glob matches no cell."""
    kinds, parts = ("model", "method", "settings", "shape"), glob.split("/")
    if len(parts) == len(kinds):
        columns = zip(*(word.split("/") for word in words), strict=True)
        for kind, part, known in zip(kinds, parts, columns, strict=True):
            if not any(fnmatchcase(label, part) for label in known):
                return f"there is no {kind} {part}; it is one of {', '.join(dict.fromkeys(known))}"
    return f"no cell is called so; they are called like {words[0]}"


def units(groups: Iterable[Group], repeats: int) -> Iterator[Unit]:
    """Every block in the order in which it is measured."""
    for group in groups:
        for repeat in range(repeats if group.timed else 1):
            for entry in group.entries:
                if repeat == 0:
                    yield Unit(entry, "memory")
                if group.timed:
                    yield Unit(entry, "timing", repeat)


@dataclass(frozen=True)
class _Request:
    cells: tuple[str, Sequence[tuple[str, str]], str, str, Shape | None]
    """Model, (method, variant) pairs, settings, shape, and the shape where the study does not list it."""
    timed: bool = True


def _asked(study: EfficiencyStudy, anchor: str, *, rehearsal: bool) -> Iterator[_Request]:
    for settings, shape in CORNERS:
        variants = [(method, "") for method in COMPARED]
        if (settings, shape) == OFFLOAD_CORNER:
            variants.append(("grass-decoder", RESIDENT))
        yield _Request((anchor, variants, settings, shape, None))
    for settings, shape in CORNERS:
        yield _Request((anchor, [("grass", MORE_LAYERS), ("grass-decoder", MORE_LAYERS)], settings, shape, None))
    if not rehearsal:
        for model in MIDDLE_MODELS:
            yield from _corners(model)
    for settings in ("plain", "lean"):
        for length in LENGTHS:
            yield _Request((anchor, [(m, "") for m in COMPARED], settings, f"1x{length}", _row(length)), timed=False)
    if rehearsal:
        rest: Iterable[str] = (anchor,)
    else:
        for model in LATE_MODELS:
            yield from _corners(model)
        rest = study.models
    for model in rest:
        for settings in study.settings:
            for shape in study.shapes:
                yield _Request((model, [(method, "") for method in study.methods], settings, shape, None))


def _corners(model: str) -> Iterator[_Request]:
    for settings, shape in CORNERS:
        yield _Request((model, [(method, "") for method in COMPARED], settings, shape, None))


def _row(length: int) -> Shape:
    return Shape(batch=1, length=length)


def _entries(
    study: EfficiencyStudy,
    model: str,
    methods: Sequence[tuple[str, str]],
    settings: str,
    shape: str,
    own_shape: Shape | None,
) -> Iterator[Entry]:
    measures = study.shapes.get(shape, own_shape)
    if model not in study.models or settings not in study.settings or measures is None:
        return
    for method, variant in methods:
        if method not in study.methods:
            continue
        cell = cell_of(study, model=model, method=method, settings=settings, shape=measures)
        options = _options(variant)
        if options.keys() <= cell.method_class().Config.model_fields.keys():
            named = Named(model=model, settings=settings, shape=shape, method=method, variant=variant)
            yield Entry(named, cell.with_options(**options) if options else cell)


def _options(variant: str) -> dict[str, Any]:
    pairs = (part.split("=") for part in variant.split(",") if part)
    return {key: int(value) if value.isdigit() else value for key, value in pairs}
