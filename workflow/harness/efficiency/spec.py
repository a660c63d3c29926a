"""The config of a study of memory and speed: its cells, the order of measuring, its goals. Imports no torch.

The code defines the kinds of comparisons; the config file alone names the methods, models, settings and shapes.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from baselines import find_method
from baselines.method import Strict
from harness.efficiency.goals import Goal, Overhead
from harness.efficiency.order import AtCorners, Corner, Lengths, Line, Variants
from harness.errors import UserError
from harness.records.device import DeviceKind
from harness.step.spec import Cell, Geometry, Numerics, Settings, Shape
from harness.study.labels import Label
from harness.study.strict_yaml import KeyPath, Source, read_yaml, validate

# ---------------------------------------------------------------- cells


class MethodEntry(Strict):
    """One row of the tables: a file in baselines/ with its options."""

    module: str
    options: dict[str, Any] = Field(default_factory=dict)
    note: str = ""
    name: str = Field(default="", description="in sentences and heads of columns; empty: the label")


class Anchor(Strict):
    """The model that gets every kind of measurement, one for each kind of device."""

    cuda: Label
    cpu: Label

    def of(self, device: DeviceKind) -> str:
        """The model's label on this device."""
        return self.cuda if device == "cuda" else self.cpu


# ---------------------------------------------------------------- the paper beside ours


class OffloadCell(Strict):
    """The cell by which `--overhead` compares moving optimizer states with keeping them on the device."""

    method: Label
    settings: Label
    shape: Label
    active_layers: tuple[int, ...] = Field(min_length=1, description="the most important first")
    least_speed: float | None = Field(default=None, gt=0, description="goal: tokens/s when moving, by those resident")
    most_gib: float | None = Field(default=None, gt=0, description="goal: allocated peak of that very run")


class ShownBeside(Strict):
    """Which of our figures is shown beside one metric of the paper."""

    batch: int = Field(gt=0, description="rows of the paper's micro-batch, which its tables leave out")
    settings: tuple[Label, ...] = Field(min_length=1)


class PaperLabels(Strict):
    """The paper's labels (config/published/) and ours."""

    settings: Label = Field(description="taken to be the paper's")
    metrics: dict[Literal["peak_memory", "throughput_ratio"], ShownBeside] = Field(min_length=1)
    models: dict[Label, Label] = Field(description="the paper's label: ours; numbers of other models are left out")
    unnamed: Label | None = Field(default=None, description="our model where the source names none; null: left out")
    methods: dict[Label, tuple[Label, ...]] = Field(
        default_factory=dict, description="where one of the paper's may be several of ours; others keep their label"
    )
    figures: dict[Label, str] = Field(
        default_factory=dict, description="kind of ours, its name before `--`: the paper's figure that it measures anew"
    )
    note: str = Field(default="", description="what of ours stands for the paper's methods, for the table's footnote")


class Stated(Strict):
    """What the authors of a method that is not run here state about it: a row of the memory table, marked as theirs."""

    name: str = Field(min_length=1)
    source: str = Field(min_length=1, description="where they state it, such as arXiv 2605.21177")
    model: str = Field(min_length=1, description="in their words, such as 7B")
    length: int | None = Field(default=None, gt=0, description="tokens a row; null: not known")
    peak_gb: float | None = Field(default=None, gt=0, description="on the device, in GB; null: no such figure is known")
    says: str = Field(min_length=1, description="what it is, and their other figures")


# ---------------------------------------------------------------- the study


class EfficiencyStudy(Strict):
    """One efficiency study: every method on every model under every setting and shape."""

    study: Label
    title: str
    notes: tuple[str, ...] = ()
    models: dict[Label, Geometry] = Field(min_length=1)
    methods: dict[Label, MethodEntry] = Field(min_length=1)
    settings: dict[Label, Settings] = Field(min_length=1)
    shapes: dict[Label, Shape] = Field(min_length=1)
    numerics: Numerics
    anchor: Anchor
    compared: tuple[Label, ...] = Field(min_length=1, description="methods of every group but the last ones")
    corners: tuple[Corner, ...] = Field(min_length=1, description="panels of the figures")
    order: tuple[Line, ...] = Field(min_length=1, description="what is measured, most wanted first")
    reference: Label = Field(description="the method that ratios are to")
    more_references: tuple[Label, ...] = Field(default=(), description="that tokens per second are related to as well")
    resident: dict[str, Any] = Field(
        default_factory=dict, description="options with which moments stay on the device: what moving them is held to"
    )
    card_gib: float = Field(default=24.0, gt=0, description="a consumer card, a line in the figure of lengths")
    overhead: OffloadCell | None = Field(default=None, description="null: `--overhead` measures the host alone")
    targets: tuple[Goal, ...] = ()
    target_notes: tuple[str, ...] = Field(default=(), description="footnotes of the table of targets")
    published: PaperLabels | None = None
    stated: tuple[Stated, ...] = Field(default=(), description="figures of others, as their authors state them")

    @model_validator(mode="after")
    def _labels_are_known(self) -> EfficiencyStudy:
        for key, kind, label in self._labels():
            known = [*getattr(self, kind), *(self._rows if kind == "shapes" else ())]
            if label not in known:
                raise ValueError(f"{key}: there is no {kind.removesuffix('s')} {label}: {did_you_mean(label, known)}")
        return self

    def _labels(self) -> Iterator[tuple[str, str, str]]:
        """(key, kind of label, label) for every label that the config uses outside its definition."""
        for name in _WITH_LABELS:
            yield from _labels_in(getattr(self, name), name, _LABEL_OF.get(name))

    @property
    def _rows(self) -> dict[str, Shape]:
        every = (tokens for line in self.order if isinstance(line, Lengths) for tokens in line.tokens)
        return {row_shape(tokens): Shape(batch=1, length=tokens) for tokens in every}

    def shape(self, label: str) -> Shape:
        """The shape with this label, which may also be the label of a single row, for the lengths in `order`."""
        return self.shapes.get(label) or self._rows[label]

    def name(self, method: str) -> str:
        """The name of a method in sentences and column heads."""
        return self.methods[method].name or method

    def model_of(self, goal: Goal) -> str:
        """The model that a goal is about."""
        return goal.model or self.anchor.cuda

    @property
    def references(self) -> tuple[str, ...]:
        """Methods that the throughput of others is divided by."""
        return (self.reference, *self.more_references)


_WITH_LABELS = (
    "anchor", "compared", "corners", "order", "reference", "more_references", "overhead", "targets", "published",
)  # fmt: skip
"""Keys of the study below which labels are used."""
_LABEL_OF = {
    **dict.fromkeys(("cuda", "cpu", "model", "models", "unnamed"), "models"),
    **dict.fromkeys(("method", "methods", "compared", "reference", "more_references", "against"), "methods"),
    "settings": "settings",
    "shape": "shapes",
}
"""Keys of the plan and of the report that hold labels, and the kind of each label."""


def _labels_in(value: object, key: str, kind: str | None) -> Iterator[tuple[str, str, str]]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _labels_in(getattr(value, name), f"{key}.{name}", _LABEL_OF.get(name))
    elif isinstance(value, Mapping | tuple):
        for place, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _labels_in(inner, f"{key}.{place}", kind)
    elif isinstance(value, str) and kind is not None:
        yield key, kind, value


def row_shape(tokens: int) -> str:
    """Label of one row of this length."""
    return f"1x{tokens}"


def variant_name(options: Mapping[str, Any]) -> str:
    """The name, in tables and records, of options that differ from the method's config entry."""
    return ",".join(f"{key}={_plain(value)}" for key, value in options.items())


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------- reading


def load_efficiency(path: Path) -> EfficiencyStudy:
    """Read and check an efficiency study: its own keys, every label, every method's options.

    Raises:
        ConfigError: the first thing that is wrong, in one line.
    """
    source = read_yaml(path)
    if "tasks" in source.value:
        raise source.error((), f"this is a study of runs, not of memory and speed: snakemake --config STUDY={path}")
    study: EfficiencyStudy = validate(EfficiencyStudy, source.value, source)
    for label, entry in study.methods.items():
        try:
            method = find_method(entry.module)
        except LookupError as error:
            raise source.error(("methods", label, "module"), str(error)) from None
        validate(method.Config, entry.options, source, ("methods", label, "options"))
    for place, line in enumerate(study.order):
        at: KeyPath = ("order", place)
        if isinstance(line, AtCorners):
            for i, variant in enumerate(line.beside):
                if variant.at not in study.corners:
                    raise source.error((*at, "beside", i), "these settings and shape are none of the corners")
                _check_options(study, variant.method, variant.options, source, (*at, "beside", i, "options"))
        elif isinstance(line, Variants):
            for label in line.methods:
                _check_options(study, label, line.options, source, (*at, "options"))
    _check_resident(study, source)
    return study


def _check_resident(study: EfficiencyStudy, source: Source) -> None:
    options = {label: find_method(entry.module).Config.model_fields for label, entry in study.methods.items()}
    for name in study.resident:
        known = sorted({option for fields in options.values() for option in fields})
        if name not in known:
            raise source.error(("resident", name), f"no method here has such an option: {did_you_mean(name, known)}")
    for place, goal in enumerate(study.targets):
        if not isinstance(goal, Overhead):
            continue
        if not study.resident:
            raise source.error(("targets", place), "an overhead is one against `resident`: give those options")
        if lacking := study.resident.keys() - options[goal.method].keys():
            able = [label for label, fields in options.items() if study.resident.keys() <= fields.keys()]
            what = f"{goal.method} has no option {min(lacking)}, which `resident` names"
            raise source.error(("targets", place, "method"), f"{what}: {did_you_mean(goal.method, able)}")
        _check_options(study, goal.method, study.resident, source, ("resident",))


def _check_options(study: EfficiencyStudy, label: str, options: Mapping[str, Any], source: Source, at: KeyPath) -> None:
    """Refuse options that a method lacks, and values that it refuses or that cannot be part of a file name."""
    entry = study.methods[label]
    config = find_method(entry.module).Config
    for name, value in options.items():
        if name not in config.model_fields:
            known = list(config.model_fields)
            raise source.error((*at, name), f"the method {label} has no such option: {did_you_mean(name, known)}")
        if not re.fullmatch(r"[\w.-]+", _plain(value)):
            raise source.error((*at, name), f"one word or number is wanted here, not {json.dumps(value)}")
    validate(config, {**entry.options, **options}, source, at)


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The known name most similar to `word`, or all known names if none is similar."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"it is one of {', '.join(known)}" if known else "it has none"


# ---------------------------------------------------------------- cells by label


def cell_of(study: EfficiencyStudy, *, model: str, method: str, settings: str, shape: Shape) -> Cell:
    """The cell with these labels, which may come from a command line; for `model` see `model_of`.

    Raises:
        UserError: a label that the study does not have, or a model that cannot be found.
    """
    return cell_with(study, model=model_of(study, model), method=method, settings=settings, shape=shape)


def cell_with(study: EfficiencyStudy, *, model: Geometry | Path, method: str, settings: str, shape: Shape) -> Cell:
    """The same of a model that was found.

    Raises:
        UserError: a label that the study does not have.
    """
    entry = study.methods[_known("method", method, study.methods)]
    return Cell(
        model=model,
        module=entry.module,
        options=entry.options,
        settings=study.settings[_known("settings", settings, study.settings)],
        shape=shape,
        numerics=study.numerics,
    )


def model_of(study: EfficiencyStudy, name: str) -> Geometry | Path:
    """A model of the study, or a folder with a config.json: a path, or of a repository of the hub.

    Of a repository only that file is fetched; a folder `MIRROR/<org>/<name>` is taken before the network.

    Raises:
        UserError: no such model; the message says what there is.
    """
    if name in study.models:
        return study.models[name]
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if Path(name).exists():
        raise UserError(f"--model {name}: no config.json there; give the folder of a model in Hugging Face layout")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        from harness.inputs.hub_models import find_configuration

        try:
            return find_configuration(name)
        except UserError as error:
            raise UserError(f"--model {name}: there is no such folder; as a repository of the hub, {error}") from error
    beside = " (or a folder with a config.json, or <org>/<name> of the hub)"
    return study.models[_known("model", name, study.models, beside)]


def _known(kind: str, label: str, among: Collection[str], beside: str = "") -> str:
    if label in among:
        return label
    near = difflib.get_close_matches(label, among, n=1)
    also = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"--{kind} {label}: it is one of {', '.join(among)}{beside}{also}")
