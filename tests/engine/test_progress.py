"""The line of progress."""

import errno
import io
import sys

import pytest

from mimkernels.engine.progress import Progress, fitting
from mimkernels.engine.tables import print_table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    name = "<stdout>"

    def flush(self) -> None:
        if self.getvalue():
            raise OSError(errno.ENOSPC, "No space left on device")


def test_what_does_not_fit_goes_in_the_order_given():
    parts = ["loss 1.0", "accuracy 0.5", "lr 1e-3", "9 images/s", "0:01 left"]
    whole = "  ".join(parts)
    assert fitting(parts, len(whole), [-3, -2]) == whole
    assert fitting(parts, len(whole) - 1, [-3, -2]) == "loss 1.0  accuracy 0.5  9 images/s  0:01 left"
    assert fitting(parts, 5, [-3, -2, 1, -1]) == "loss 1.0"


def test_a_narrow_terminal_shows_whole_numbers(monkeypatch):
    """Cut figures, such as 0.5…, are none."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = Progress(total_steps=20, steps_per_epoch=10, quiet=False, stream=stream)
    progress.start(0)
    measured = {"accuracy": 0.125, "val_loss": 1.625}
    for step in (10, 20):
        progress.update(step, loss=2.25, lr=1e-3, images_per_second=99.5, steps_per_second=2.0, metrics=measured)
    progress.stop()
    shown = stream.getvalue()
    assert "loss 2.2500" in shown and "0:00 left" in shown and "…" not in shown and "images/s" not in shown


def test_a_process_without_standard_output_trains_in_silence(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    progress = Progress(total_steps=20, steps_per_epoch=10, quiet=False)
    progress.start(0)
    progress.update(20, loss=2.25, lr=1e-3, images_per_second=99.5, steps_per_second=2.0)
    progress.stop()
    print_table(["loss"], [["1"]])


@pytest.mark.parametrize("way", ["note", "table"])
def test_an_output_that_cannot_be_written_is_named(way):
    """Where it was not, a full disk behind standard output passed for one of the run's folder."""
    stream = Full()
    with pytest.raises(OSError, match="No space left") as caught:
        if way == "note":
            Progress(total_steps=20, steps_per_epoch=10, quiet=False, stream=stream).note("a line")
        else:
            print_table(["loss"], [["1"]], stream=stream)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "<stdout>"
