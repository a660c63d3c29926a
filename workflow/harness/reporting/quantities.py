"""What one cell of a table by name holds: one number a run, and how several runs become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from pandas import DataFrame

from harness.records.units import GIB
from harness.reporting.frames import Frames
from harness.study.views import Quantity


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One quantity: where each run has it, how runs are summarised, and how it is shown."""

    unit: str
    digits: int
    factor: float
    """From the stored unit to the shown one."""
    mean: Callable[[Sequence[float]], float]
    column: str
    """Of the scores if `of_suites`, else of the runs."""
    of_suites: bool = False
    least_runs: int = 1
    spread: bool = True
    """Whether a standard deviation over seeds stands beside it."""


QUANTITIES: dict[Quantity, Summary] = {
    "accuracy": Summary(unit="%", digits=2, factor=100, mean=fmean, column="accuracy", of_suites=True),
    "accuracy_sd": Summary(
        unit="points, standard deviation over seeds", digits=2, factor=100, mean=stdev, column="accuracy",
        of_suites=True, least_runs=2, spread=False,
    ),
    "heldout_loss": Summary(
        unit="nats per answer token", digits=4, factor=1, mean=fmean, column="heldout_loss", of_suites=True
    ),
    "validation_loss": Summary(
        unit="nats per answer token", digits=4, factor=1, mean=fmean, column="validation_loss"
    ),
    "peak_memory": Summary(
        unit="GiB, largest of the runs, NVML, whole process", digits=2, factor=1 / GIB, mean=max,
        column="nvml_process_peak_bytes", spread=False,
    ),
    "throughput": Summary(
        unit="tokens/s, median of the runs", digits=0, factor=1, mean=median, column="throughput_tokens_per_s",
        spread=False,
    ),
}  # fmt: skip


def values(frames: Frames, runs: DataFrame, quantity: Quantity, suites: Sequence[str]) -> list[float]:
    """One number a run in the stored unit: the plain mean over the suites, or a column of the runs.

    Args:
        frames: the study's tables.
        runs: rows of `frames.runs`; one that lacks a suite, or the value, does not count.
        quantity: which.
        suites: of the runs' task, where the quantity is of suites.
    """
    wanted = QUANTITIES[quantity]
    if not wanted.of_suites:
        return [float(value) for value in runs[wanted.column].dropna()]
    # a number for written answers has no likelihood beside it
    written = frames.scores[frames.scores["scoring"] != "likelihood"] if wanted.column == "accuracy" else frames.scores
    scores = written[written["run"].isin(list(runs["run"])) & written["suite"].isin(list(suites))]
    found = []
    for run in runs["run"]:
        known = [float(value) for value in scores.loc[scores["run"] == run, wanted.column].dropna()]
        if known and len(known) == len(suites):
            found.append(fmean(known))
    return found
