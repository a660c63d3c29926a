"""The order in which a study's cells are measured: the kinds of entries in its `order` list. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from baselines.method import Strict
from harness.study.labels import Label

Options = Annotated[
    dict[str, Any], Field(min_length=1, description="that differ from the method's entry: words and numbers")
]


class Corner(Strict):
    """Settings and shape under which methods are compared."""

    settings: Label
    shape: Label


class Variant(Strict):
    """A method with other options, at one corner."""

    method: Label
    options: Options
    settings: Label
    shape: Label

    @property
    def at(self) -> Corner:
        """Its corner."""
        return Corner(settings=self.settings, shape=self.shape)


class AtCorners(Strict):
    """The compared methods at every corner; without models: of the anchor."""

    kind: Literal["corners"]
    models: tuple[Label, ...] = ()
    beside: tuple[Variant, ...] = Field(default=(), description="measured together with the methods of their corner")


class Variants(Strict):
    """Methods with other options, at every corner of the anchor, apart from the compared ones."""

    kind: Literal["variants"]
    methods: tuple[Label, ...] = Field(min_length=1)
    options: Options


class Lengths(Strict):
    """The compared methods on one row of the anchor, by its length; memory alone."""

    kind: Literal["lengths"]
    settings: tuple[Label, ...] = Field(min_length=1)
    tokens: tuple[Annotated[int, Field(gt=1)], ...] = Field(min_length=1)


class Everything(Strict):
    """Every method on every model under every setting and shape."""

    kind: Literal["everything"]


Line = Annotated[AtCorners | Variants | Lengths | Everything, Field(discriminator="kind")]
