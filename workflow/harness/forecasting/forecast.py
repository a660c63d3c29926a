"""Peak memory of a cell: the real code of model, loss and method, run on tensors without values."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from baselines.method import Expectation, ModelFacts
from grass.host import using
from harness.errors import first_line
from harness.forecasting.fake_device import CountingHost, ForecastHost, tensors_without_values
from harness.forecasting.memo import Memo
from harness.forecasting.tracker import Kind, Span, Tracker
from harness.measuring.census import state_bytes, state_tensors
from harness.step.architecture import Attention, attention_of
from harness.step.cell import CellRun, Phase
from harness.step.spec import Cell, Shape
from harness.step.worst_case import run_worst_case

NO_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
    fake_tensor.UnsupportedFakeTensorException,
)
"""Exceptions that torch raises when code asks a fake tensor for a value."""
_SIGNS = ("tensor subclasses", "convert all Tensors to FakeTensors", "not linked with support")
"""Phrases from errors that torch raises for the same reason without a separate exception class."""
DEFAULT_KIND: dict[Phase, Kind] = {
    "load": "other",
    "probe": "activations",
    "resample": "other",
    "forward": "activations",
    # backward begins with the gradient of the loss
    "backward": "loss",
    "update": "other",
    "observe": "activations",
    "evaluate": "activations",
}
"""Default kind of the storages allocated in a phase; the phases are in the order in which they are shown."""


OWN = ("observe", "evaluate")
"""Phases of the harness itself, which only the forecast of a run has."""


class NoForecastError(ValueError):
    """A cell that cannot be forecast; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Forecast memory of a cell; bytes are those of live storages on the device unless stated otherwise."""

    peak_bytes: int
    """Highest peak of all phases except `load`."""
    peak_phase: Phase
    by_phase: dict[Phase, int]
    """Peak in each phase, over all draws."""
    by_kind: dict[Kind, int]
    """Bytes alive at the peak, by kind."""
    worst_draw: tuple[int, ...] | None
    """Active layers at the peak; None for methods that draw no layers."""
    by_draw: dict[str, int]
    """Peak of the steps under each draw that was tried, by the draw's layers."""
    largest_elements: int
    """Entries of the largest single storage born after `load`."""
    device_state_bytes: int
    """Optimizer states on the device between two steps."""
    host_bytes: int
    """Optimizer states on the host between two steps, once every layer has trained: computed from parameter counts."""
    facts: ModelFacts
    promise: Expectation
    assumed: tuple[str, ...]
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What the harness does in a run besides steps: the largest batch of each."""

    observed: Shape
    """Of the observer's probe."""
    evaluated: Shape
    """Of validation."""


def forecast(
    cell: Cell,
    *,
    looks: Looks | None = None,
    tensors: Literal["fake", "real"] = "fake",
) -> Forecast:
    """Run a cell step by step under every candidate for the worst draw.

    Args:
        cell: what to forecast.
        looks: of the run that the cell stands for; None: of the steps alone.
        tensors: `fake` only counts; `real` also computes, on the CPU, for tests of the count.

    Raises:
        CannotRunError: the method refuses the cell.
        NoForecastError: model, loss and method do not fit together, the code reads a value that only a real tensor
            has, or it draws layers in a way that cannot be forced.
    """
    started = time.perf_counter()
    for package in cell.method_class().REQUIRES:
        # import now: a module that makes tensors on import must not make fake ones
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(package)
    tracker = Tracker()
    with ExitStack() as stack:
        stack.enter_context(_steady_garbage())
        host = ForecastHost if tensors == "fake" else CountingHost
        stack.enter_context(using(host(tracker, capacity_bytes=cell.capacity_bytes)))
        if tensors == "fake":
            tracker.call = Memo(stack.enter_context(tensors_without_values()))
        stack.enter_context(tracker)
        try:
            run = _Watched(cell, tracker)
            run.all_steps()
            if looks is not None:
                run.look(looks)
        except ValueError as error:
            raise NoForecastError(first_line(error)) from error
        except (RuntimeError, AssertionError) as error:
            if not isinstance(error, NO_VALUES) and not any(sign in str(error) for sign in _SIGNS):
                raise
            raise NoForecastError(
                f"{_place(error)}: the code asks a tensor for values, or a device, that a forecast does not have (a "
                f"method reads numbers through baselines.method.host_number): {first_line(error)}"
            ) from error
        return run.forecast(wall_s=time.perf_counter() - started, auto=cell.options.get("offload") == "auto")


class _Watched:
    """A cell's run that tells the tracker the current phase and the kinds of storages."""

    def __init__(self, cell: Cell, tracker: Tracker) -> None:
        self._tracker = tracker
        self._run: CellRun | None = None
        self._run = run = CellRun(cell, steps=1000, device="cpu", enter=self._enter)
        if run.promise.layers == "chosen" and run.promise.period_steps is not None:
            raise NoForecastError("it chooses tensors by itself, and a forecast cannot tell it the worst choice")
        self._drawn = run.promise.layers == "sampled"
        self._watch_loss(run.model)

    # ------------------------------------------------------------ steps

    def all_steps(self) -> None:
        """Probe, then the steps of the worst case."""
        run = self._run
        assert run is not None
        gc.freeze()  # keeps the collections at phase boundaries from scanning the model, which is no garbage
        self._tracker.restart()
        run.prepare()
        run_worst_case(run, held_bytes=self._device_state_bytes, watches_memory=lambda: self._tracker.memory_was_read)
        if self._drawn and not run.draws.made:
            raise NoForecastError(
                "it draws layers by itself: draw through grass.sampling.draw_layers, which can be told what to draw"
            )
        self._enter("load")

    def look(self, looks: Looks) -> None:
        """The harness's own work, when every state that is ever kept is there."""
        assert self._run is not None
        self._run.look(observed=looks.observed, evaluated=looks.evaluated)
        self._enter("load")

    # ------------------------------------------------------------ what is made

    def _enter(self, phase: Phase) -> None:
        run, tracker = self._run, self._tracker
        label = ""
        if run is not None:
            parameters = list(run.module.parameters())
            tracker.mark("weights", [*parameters, *run.module.buffers()])
            tracker.mark("gradients", [p.grad for p in parameters if p.grad is not None])
            tracker.mark("optimizer states", state_tensors(run.method.optimizer))
            label = str(list(run.draws.made[-1])) if run.draws.made else ""
        tracker.enter(phase, label)
        tracker.making = DEFAULT_KIND[phase]

    def _device_state_bytes(self) -> int:
        """Bytes of optimizer states that count as device memory."""
        assert self._run is not None
        return state_bytes(self._run.method.optimizer, counts=self._tracker.holds)

    def _host_bytes(self) -> int:
        run = self._run
        assert run is not None
        if not self._tracker.host:
            return 0
        facts, promise = run.facts, run.promise
        states = sum(promise.state_bytes_of_layers(facts)) + promise.state_bytes_outside(facts)
        return states - self._device_state_bytes()

    def _watch_loss(self, model: Any) -> None:
        """Attribute storages made between head and loss, in forward and backward, to the loss."""
        tracker = self._tracker

        def body(*_: Any) -> None:
            tracker.making = "activations"

        def head(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            tracker.making = "loss"
            if arguments[0].requires_grad:
                arguments[0].register_hook(body)

        model.get_input_embeddings().register_forward_pre_hook(body)
        output = model.get_output_embeddings()
        if output is not None:
            output.register_forward_pre_hook(head)

    # ------------------------------------------------------------ result

    def forecast(self, *, wall_s: float, auto: bool) -> Forecast:
        """The forecast, from the recorded spans."""
        run, tracker = self._run, self._tracker
        assert run is not None
        spans = [span for span in tracker.spans if span.phase != "load"]
        worst = max(spans, key=lambda span: span.peak_bytes)
        by_phase = {
            name: max((s.peak_bytes for s in tracker.spans if s.phase == name), default=0)
            for name in DEFAULT_KIND
            if name not in OWN or any(s.phase == name for s in tracker.spans)
        }
        return Forecast(
            peak_bytes=worst.peak_bytes,
            peak_phase=worst.phase,  # type: ignore[arg-type]
            by_phase=by_phase,
            by_kind=tracker.by_kind(worst.at),
            worst_draw=_layers(worst) if self._drawn else None,
            by_draw=_by_draw(spans) if self._drawn else {},
            largest_elements=max(span.largest_elements for span in spans),
            device_state_bytes=self._device_state_bytes(),
            host_bytes=self._host_bytes(),
            facts=run.facts,
            promise=run.promise,
            assumed=_assumptions(
                attention_of(run.model), drawn=self._drawn, visited=run.promise.state_of == "visited", auto=auto
            ),
            wall_s=wall_s,
        )


def _layers(span: Span) -> tuple[int, ...]:
    return tuple(int(part) for part in span.label.strip("[]").split(",") if part.strip())


def _by_draw(spans: list[Span]) -> dict[str, int]:
    """Peaks of forward, backward and update under each draw that saw a forward pass."""
    found: dict[str, int] = {}
    stepped = {span.label for span in spans if span.phase == "forward"}
    for span in spans:
        if span.label in stepped and span.phase in ("forward", "backward", "update"):
            found[span.label] = max(found.get(span.label, 0), span.peak_bytes)
    return found


def _assumptions(attention: Attention, *, drawn: bool, visited: bool, auto: bool) -> tuple[str, ...]:
    kernel = "scaled_dot_product_attention with a fused kernel"
    if attention.why is not None:
        kernel = f"products of whole matrices ({attention.why})"
    said = [
        "live storages, rounded up to 512 bytes each; a GPU adds its context (0.4 to 0.6 GiB), fragments and buffers "
        "inside kernels",
        f"no padding; attention by {kernel}",
    ]
    if drawn:
        said.append("the worst of the draws tried, one of them with layer 0 and the topmost layers")
    if visited:
        said.append("every layer has trained before, so that all states that are ever kept are there")
    if auto:
        said.append("offload: auto moves states, as it does where free memory at the peak is short")
    return tuple(said)


def _place(error: BaseException) -> str:
    """The last line outside torch and this package that an exception went through: of a model, or of a method."""
    apart = (Path(torch.__file__).parent, Path(__file__).parent)
    lines = [
        (path, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not any((path := Path(frame.f_code.co_filename)).is_relative_to(folder) for folder in apart)
    ]
    return f"{lines[-1][0].name}, line {lines[-1][1]}"


@contextmanager
def _steady_garbage() -> Iterator[None]:
    """Collect garbage only at phase boundaries, so that it happens at the same points on fake and on real tensors."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
