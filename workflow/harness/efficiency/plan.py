"""Which cells are measured, in which order: cells that the goals need come first; a time budget cuts off the end.

Methods that are compared form a group. Its repeats are interleaved (every method once, then every method again), so
that drifting clocks or temperature affect all of them equally.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from harness.efficiency.order import AtCorners, Corner, Everything, Lengths, Line, Variants
from harness.efficiency.record import Block, Named
from harness.efficiency.spec import EfficiencyStudy, cell_of, row_shape, variant_name
from harness.errors import UserError
from harness.records.device import DeviceKind
from harness.step.spec import Cell


@dataclass(frozen=True)
class Entry:
    """A cell with its labels."""

    named: Named
    cell: Cell

    @property
    def words(self) -> str:
        """The text that the globs of `--only` are matched with."""
        named = self.named
        return f"{named.model}/{named.label}/{named.settings}/{named.shape}"


@dataclass(frozen=True)
class Group:
    """Cells that are compared with one another: one model, settings and shape."""

    entries: tuple[Entry, ...]
    timed: bool


@dataclass(frozen=True)
class Unit:
    """One block of one cell: the smallest unit of measurement, and the most that a crash can lose."""

    entry: Entry
    do: Literal["memory", "timing"]
    repeat: int = 0

    @property
    def block(self) -> Block:
        """The block of the record that this unit fills."""
        return self.do


def plan(study: EfficiencyStudy, device: DeviceKind, only: Sequence[str] = ()) -> list[Group]:
    """All groups by priority; a cell in two entries of the study's `order` belongs to the first one's group.

    Args:
        study: with its models, methods, settings and shapes.
        device: a CPU measures only its anchor model.
        only: see `select`.
    """
    anchor = study.anchor.of(device)
    groups: list[Group] = []
    seen: set[str] = set()
    for line in study.order:
        for group in _groups(study, line, anchor):
            if device == "cpu" and group.entries[0].named.model != anchor:
                continue
            new = tuple(entry for entry in group.entries if entry.named.name not in seen)
            seen.update(entry.named.name for entry in new)
            if new:
                groups.append(Group(new, timed=group.timed))
    return select(groups, only)


def every_group(study: EfficiencyStudy) -> list[Group]:
    """The groups of a GPU's plan, then those that only a rehearsal on a CPU has."""
    groups = plan(study, "cuda")
    known = {entry.named.name for group in groups for entry in group.entries}
    for group in plan(study, "cpu"):
        more = tuple(entry for entry in group.entries if entry.named.name not in known)
        if more:
            groups.append(Group(more, group.timed))
    return groups


def cells(groups: Iterable[Group]) -> list[Entry]:
    """All cells of the groups, in their order."""
    return [entry for group in groups for entry in group.entries]


def select(groups: Iterable[Group], only: Sequence[str]) -> list[Group]:
    """The groups, reduced to the cells that match a glob; all groups if no glob is given.

    Args:
        groups: to choose from.
        only: globs for model/method/settings/shape; a method's variant follows a plus sign.

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
    """Which part of a glob matches no cell."""
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


def once_more(groups: Iterable[Group], repeats: int, unsure: Callable[[Entry], bool]) -> Iterator[Unit]:
    """Further repeats, at most as many again, of groups in which a cell's speed is not known well enough.

    The whole group is timed again, since ratios are taken repeat by repeat.

    Args:
        groups: the plan.
        repeats: of every cell, made before.
        unsure: whether a cell's speed is not known well enough yet; asked before each further repeat.
    """
    for repeat in range(repeats, 2 * repeats):
        for group in groups:
            if group.timed and any(unsure(entry) for entry in group.entries):
                yield from (Unit(entry, "timing", repeat) for entry in group.entries)


def _groups(study: EfficiencyStudy, line: Line, anchor: str) -> Iterator[Group]:
    compared = _as_entered(study.compared)
    match line:
        case AtCorners():
            for model in line.models or (anchor,):
                for corner in study.corners:
                    beside = [(v.method, v.options) for v in line.beside if v.at == corner]
                    yield _group(study, model, [*compared, *beside], corner)
        case Variants():
            for corner in study.corners:
                yield _group(study, anchor, [(method, line.options) for method in line.methods], corner)
        case Lengths():
            for settings in line.settings:
                for tokens in line.tokens:
                    row = Corner(settings=settings, shape=row_shape(tokens))
                    yield _group(study, anchor, compared, row, timed=False)
        case Everything():
            for model in study.models:
                for settings in study.settings:
                    for shape in study.shapes:
                        where = Corner(settings=settings, shape=shape)
                        yield _group(study, model, _as_entered(study.methods), where)


def _as_entered(methods: Iterable[str]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(method, {}) for method in methods]


def _group(
    study: EfficiencyStudy,
    model: str,
    methods: Sequence[tuple[str, Mapping[str, Any]]],
    where: Corner,
    *,
    timed: bool = True,
) -> Group:
    """A group of methods, each with the options that differ from its config entry."""
    entries = []
    for method, options in methods:
        cell = cell_of(study, model=model, method=method, settings=where.settings, shape=study.shape(where.shape))
        named = Named(
            model=model,
            settings=where.settings,
            shape=where.shape,
            method=method,
            variant=variant_name(options),
        )
        entries.append(Entry(named, cell.with_options(**options) if options else cell))
    return Group(tuple(entries), timed)
