"""Steps that meet a cell's peak of memory: states everywhere that they can be, and every candidate for the worst draw.

A forecast makes the same steps, so that what is predicted and what is measured is one thing.
"""

from __future__ import annotations

from collections.abc import Callable

from harness.step.draws import CANDIDATES, Policy, covering
from harness.step.run import STEPS_A_DRAW, CellRun


def run_worst_draws(run: CellRun, held_bytes: Callable[[], int]) -> None:
    """Visit every layer whose states stay on the device, then step under each candidate draw.

    Args:
        run: attached and prepared; it must draw every `STEPS_A_DRAW` steps, if it draws at all.
        held_bytes: optimizer states on the device now.
    """
    steps = _Periods()
    if run.promise.layers != "sampled":
        steps.period(run.step, CANDIDATES[0])
        return
    layers, count = run.facts.layers, run.promise.active_layers or 1
    distinct = {policy(layers, count): policy for policy in reversed(CANDIDATES)}
    candidates = list(reversed(distinct.values()))
    # every period trains what was drawn as the one before it ended; the first one, the first candidate
    visits = covering(layers, count) if run.promise.state_of == "visited" else []
    held = -1
    for then in visits:
        steps.period(run.visit, then)
        held, before = held_bytes(), held
        if held == before:
            break  # what falls asleep leaves the device: more visits would change nothing there
    if visits:
        steps.period(run.visit, candidates[0])
    for then in [*candidates[1:], candidates[-1]]:
        steps.period(run.step, then)


class _Periods:
    """Counts steps."""

    def __init__(self) -> None:
        self._done = 0

    def period(self, act: Callable[..., None], then: Policy) -> None:
        """The steps from one draw to the next; `then` is the policy of the next."""
        for place in range(STEPS_A_DRAW):
            act(self._done, then=then if place == STEPS_A_DRAW - 1 else None)
            self._done += 1
