"""Steps that reach a cell's peak memory: all optimizer states exist, and every candidate for the worst draw is tried.

Forecasts and measurements run the same steps, so that they are about the same quantity.
"""

from __future__ import annotations

from collections.abc import Callable

from harness.step.cell import STEPS_PER_DRAW, CellRun
from harness.step.draws import CANDIDATES, Policy, covering, heaviest


def run_worst_case(
    run: CellRun, *, held_bytes: Callable[[], int], watches_memory: Callable[[], bool] = lambda: True
) -> None:
    """Let every layer whose states stay on the device train once, then step under each candidate draw.

    A period trains the layers drawn at the end of the period before it; the first period trains the first candidate.

    Args:
        run: attached and prepared; it must draw every `STEPS_PER_DRAW` steps, if it draws at all.
        held_bytes: optimizer states on the device now.
        watches_memory: whether the method reads memory use. Such a method acts on what it saw in a period's first step.
            For any other method that step only allocates states, so a zero-gradient step, which is faster, takes its
            place.
    """
    steps = _Periods(run, watches_memory)
    candidates, visits = [CANDIDATES[0]], []
    if run.promise.layers == "sampled":
        layers, count = run.facts.layers, run.promise.active_layers or 1
        distinct: dict[tuple[int, ...], Policy] = {}
        for policy in (*CANDIDATES, *heaviest(run.promise.layer_trained_parameters or run.facts.layer_parameters)):
            distinct.setdefault(policy(layers, count), policy)
        candidates = list(distinct.values())
        visits = covering(layers, count) if run.promise.state_of == "visited" else []
    held = -1
    for then in visits:
        steps.period(run.zero_gradient_step, then)
        held, before = held_bytes(), held
        if held == before:
            break  # states of inactive layers leave the device, so further visits would not add any there
    steps.period(run.zero_gradient_step, candidates[0])
    for then in [*candidates[1:], candidates[-1]]:
        steps.period(run.step, then)


class _Periods:
    """Runs the steps of one period after another, and counts them."""

    def __init__(self, run: CellRun, watches_memory: Callable[[], bool]) -> None:
        self._run, self._watches_memory = run, watches_memory
        self._done = 0

    def period(self, act: Callable[..., None], then: Policy) -> None:
        """Run one period, its last step by `act`; `then` is the policy of the draw that ends it."""
        for place in range(STEPS_PER_DRAW):
            last = place == STEPS_PER_DRAW - 1
            first = act if self._watches_memory() else self._run.zero_gradient_step
            (act if last else first)(self._done, then=then if last else None)
            self._done += 1
