"""Ctrl-C and termination requests end training after the current step, with a checkpoint."""

import signal
import threading
from types import FrameType
from typing import Any


class StopSignal:
    """Notes the first SIGINT or SIGTERM inside its ``with`` block in ``number``; a second one acts as usual."""

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __exit__(self, *exc: object) -> None:
        self._restore()
