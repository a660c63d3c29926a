"""A run that is told to end (SIGTERM of a cluster's preemption, Ctrl-C) saves its state first."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from harness.progress import say

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Termination:
    """Notes the signals that ask this process to end, so that it ends between two steps.

    Outside the block they do what they did before. Only the main thread can listen; elsewhere nothing is noted.

    Args:
        patient: a second signal does not end the process at once. One of several processes is told twice: by whoever
            ends the run, and by the launcher.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self._patient = patient
        self.asked: int | None = None
        """Number of the first signal."""
        self._usual: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._usual = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)

    @staticmethod
    def leave(number: int, where: str, *, tell: bool = True) -> NoReturn:
        """End the process, with the exit code that a shell gives to one that a signal ended.

        Args:
            number: of the signal.
            where: the first words of the line.
            tell: whether to say a line.

        Raises:
            SystemExit: always.
        """
        if tell:
            say(f"{where}: stopped by {signal.Signals(number).name}; the same command again goes on from here")
        raise SystemExit(128 + number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and not self._patient:  # asked twice: at once
            raise SystemExit(128 + number)
        self.asked = self.asked or number
