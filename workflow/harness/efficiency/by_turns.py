"""Contenders timed by turns, what of a call is spent where, and how their ratios lie. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import quantiles
from typing import Any, Literal, Self

from harness.measuring.clock import StepClock
from harness.records.device import StrictRecord


def interleaved(contenders: Mapping[str, Callable[[], object]], *, warmup: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of every contender in every round, by contender.

    Every round calls each contender once, every other round in the reverse order, so that a machine that grows slower
    or faster does so for all alike. The first `warmup` rounds are not recorded.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    clock = StepClock("cpu")
    for number in range(warmup + rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            clock.start()
            contenders[name]()
            taken = clock.stop()
            if number >= warmup:
                seconds[name].append(taken)
    return seconds


@contextmanager
def timed_calls(
    owner: object, names: Sequence[str], *, device: Literal["cpu", "cuda"] = "cpu"
) -> Iterator[dict[str, float]]:
    """Yields the seconds spent inside these methods of an object while the block lasts, by name.

    On CUDA they are the stream's, and each call is waited for.

    Raises:
        AttributeError: the object has no such method, as after a change of its name.
    """
    seconds = dict.fromkeys(names, 0.0)

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            clock = StepClock(device)
            clock.start()
            result = method(*arguments, **named)
            seconds[name] += clock.stop()
            return result

        return call

    for name, method in [(name, getattr(owner, name)) for name in names]:
        setattr(owner, name, timed(name, method))
    try:
        yield seconds
    finally:
        for name in names:
            delattr(owner, name)


class Spread(StrictRecord):
    """How several values lie; the key that this stands under names their unit."""

    least: float
    low_quartile: float
    median: float
    high_quartile: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of these values, of which there must be at least one."""
        # with one value there is nothing between
        low, median, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(
            least=min(values),
            low_quartile=low,
            median=median,
            high_quartile=high,
            most=max(values),
            count=len(values),
        )

    def text(self, form: str = ".3f") -> str:
        """`median (low quartile to high quartile)`, each in this format."""
        return f"{self.median:{form}} ({self.low_quartile:{form}} to {self.high_quartile:{form}})"


def ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Pair by pair, `one` divided by `other`: neighbours in time, so a busy machine slows both."""
    return [a / b for a, b in zip(one, other, strict=True)]
