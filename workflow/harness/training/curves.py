"""Live curves of runs for TensorBoard, off unless `GRASS_TENSORBOARD` names a folder.

Steps are gathered and handed over between two steps, and it is waited for TensorBoard's thread, so that nothing of it
runs on a step's clock; its import does count in the host's memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from harness.progress import say
from harness.study.curves import FOLDER, wanted

EVERY_S = 5.0
"""Seconds between two writes."""
_NEVER_S = 10**6
_SHOWN = ("loss", "lr_factor", "grad_norm", "step_s")


class Curves:
    """The curves of one run: of every step and of every look of the observer.

    Args:
        name: of the run.
        first_step: of this process; what a killed one drew beyond it is drawn anew.
        shown: False draws nothing, as where none are asked for.
    """

    def __init__(self, name: str, *, first_step: int, shown: bool = True) -> None:
        self._writer: Any = None
        self._left: list[tuple[float, int, str, float]] = []
        self._written = time.monotonic()
        folder = wanted() if shown else None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            try:
                # its thread must sleep while nothing is handed over
                self._writer = SummaryWriter(folder / name, purge_step=first_step or None, flush_secs=_NEVER_S)
            except OSError as error:
                self._give_up(error)

    def __enter__(self) -> Curves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()
        if self._writer is not None:
            self._writer.close()

    def step(self, row: Mapping[str, Any]) -> None:
        """One step's row of the log."""
        if self._writer is None:
            return
        known = {key: row[key] for key in _SHOWN if row[key] is not None}
        if row["step_s"]:
            known["tokens_per_s"] = row["tokens"] / row["step_s"]
        self._add(row["step"], {f"train/{key}": value for key, value in known.items()})
        if time.monotonic() - self._written >= EVERY_S:
            self._write()

    def observed(self, row: Mapping[str, Any]) -> None:
        """One row of the observer."""
        if self._writer is not None:
            self._add(row["step"], {"observed/validation_loss": row["validation_loss"]})

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time()
        self._left += [(now, step, key, value) for key, value in values.items()]

    def _write(self) -> None:
        if self._writer is None:
            return
        try:
            for at, step, key, value in self._left:
                self._writer.add_scalar(key, value, step, walltime=at)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)
        self._left.clear()
        self._written = time.monotonic()

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        say(f"warning: no curves any more: {os.environ[FOLDER]} cannot be written ({error.strerror})")
