"""Whether host memory will hold the moments of every layer: known before the first step, and needed long after it."""

from __future__ import annotations

from baselines.method import Expectation, ModelFacts
from harness.records.units import gib
from harness.step.attach import Attached


def visited_state_bytes(promise: Expectation, facts: ModelFacts) -> int | None:
    """Bytes of optimizer state once every layer was drawn; None for methods whose state does not grow with draws."""
    if promise.state_of != "visited":
        return None
    if promise.layers == "chosen":
        return promise.state_bytes_per_parameter * facts.total_parameters
    return sum(promise.layer_state_bytes or promise.state_bytes_of_layers(facts)) + promise.state_bytes_outside(facts)


def too_little_host_memory(run: Attached, device: str, *, processes: int, free: int | None) -> str | None:
    """Why a run would be killed when enough layers were drawn; None if it has room, or if that is not known.

    Args:
        run: a model with its method attached, before its first step.
        device: of the run; on the CPU every state is in host memory.
        processes: that train one run on this machine, each with states of its own.
        free: bytes of host memory that this process can still take; None where unknown.
    """
    needed = visited_state_bytes(run.promise, run.facts)
    if needed is None or free is None or not (device == "cpu" or run.method.sleeps_on_host()):
        return None
    needed *= processes
    if needed <= free:
        return None
    return (
        f"too little host memory: once every layer was drawn, the optimizer's state takes {gib(needed)} GiB, and "
        f"{gib(free)} GiB are free; take a machine with more, moments of fewer bytes (recipe.state_dtype), or a method "
        "that drops the moments of sleeping layers (state: reset)"
    )
