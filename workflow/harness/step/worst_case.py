"""Steps that meet a cell's peak of memory: states everywhere that they can be, and every candidate for the worst draw.

A forecast and a measurement make the same steps, so that what is predicted and what is measured is one thing.
"""

from __future__ import annotations

from collections.abc import Callable

from harness.step.cell import STEPS_A_DRAW, CellRun
from harness.step.draws import CANDIDATES, Policy, covering


def run_worst_case(
    run: CellRun, *, held_bytes: Callable[[], int], watches_memory: Callable[[], bool] = lambda: True
) -> None:
    """Let every layer whose states stay on the device train once, then step under each candidate draw.

    A period trains what was drawn as the one before it ended; the first one trains the first candidate.

    Args:
        run: attached and prepared; it must draw every `STEPS_A_DRAW` steps, if it draws at all.
        held_bytes: optimizer states on the device now.
        watches_memory: whether the method asks how much memory is taken. One that does acts upon what the first step
            of a period shows; for any other that step only makes states, which a visit makes too, in less time.
    """
    steps = _Periods(run, watches_memory)
    candidates, visits = [CANDIDATES[0]], []
    if run.promise.layers == "sampled":
        layers, count = run.facts.layers, run.promise.active_layers or 1
        distinct = {policy(layers, count): policy for policy in reversed(CANDIDATES)}
        candidates = list(reversed(distinct.values()))
        visits = covering(layers, count) if run.promise.state_of == "visited" else []
    held = -1
    for then in visits:
        steps.period(run.visit, then)
        held, before = held_bytes(), held
        if held == before:
            break  # what falls asleep leaves the device: more visits would change nothing there
    steps.period(run.visit, candidates[0])
    for then in [*candidates[1:], candidates[-1]]:
        steps.period(run.step, then)


class _Periods:
    """Makes the steps from one draw to the next, and counts them."""

    def __init__(self, run: CellRun, watches_memory: Callable[[], bool]) -> None:
        self._run, self._watches_memory = run, watches_memory
        self._done = 0

    def period(self, act: Callable[..., None], then: Policy) -> None:
        """`then` is the policy of the draw that ends the period."""
        for place in range(STEPS_A_DRAW):
            last = place == STEPS_A_DRAW - 1
            first = act if self._watches_memory() else self._run.visit
            (act if last else first)(self._done, then=then if last else None)
            self._done += 1
