"""What a person sees while training: a live bar on a terminal, now and then a plain line elsewhere."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_BAR = 17  # characters of a short bar, its percentage, and what is between them


def duration(seconds: float) -> str:
    """``1:02:03`` or ``4:05``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def counted(number: int, noun: str) -> str:
    """``1 epoch``, ``1,200 steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str, stream: TextIO | None = None) -> str:
    """`text` with what `stream` (or UTF-8) cannot encode, as bytes of a path that are no text, as Python shows it."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, stream: TextIO | None, end: str = "\n") -> None:
    """Write `text` to `stream`, if there is one; what that refuses, as a full disk or a closed pipe, names it.

    Without the name it would pass for a refusal of the run's folder.
    """
    try:
        print(printable(text, stream), file=stream, end=end, flush=True)
    except OSError as e:
        raise OSError(e.errno, e.strerror, getattr(stream, "name", "output")) from e


def fitting(parts: Sequence[str], width: int, dispensable: Sequence[int]) -> str:
    """`parts` on one line of `width` characters: the first of those by their numbers in `dispensable` that can go."""
    kept = list(range(len(parts)))
    for number in dispensable:
        if len("  ".join(parts[i] for i in kept)) <= width:
            break
        kept.remove(number % len(parts))
    return "  ".join(parts[i] for i in kept)


class Progress:
    """Progress of one run; silent in all processes but the first."""

    def __init__(self, *, total_steps: int, steps_per_epoch: int, quiet: bool, stream: TextIO | None = None) -> None:
        self.total_steps, self.steps_per_epoch, self.quiet = total_steps, steps_per_epoch, quiet
        self.stream: TextIO | None = stream or sys.stdout  # None in a process without standard output
        self._bar: RichProgress | None = None
        self._started = self._printed = time.monotonic()

    def start(self, first_step: int) -> None:
        self._started = self._printed = time.monotonic()
        if self.quiet or self.stream is None or not self.stream.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        bar = RichProgress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            console=Console(file=self.stream),
            expand=True,
        )
        self._bar = bar
        bar.start()
        self._task = bar.add_task(
            "", total=self.total_steps, completed=first_step, epoch=self._epoch(first_step), figures=""
        )

    def update(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        images_per_second: float,
        steps_per_second: float,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """After ``step`` optimizer steps; `metrics` are shown behind the loss."""
        if self.quiet:
            return
        measured = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in (metrics or {}).items()]
        left = (self.total_steps - step) / max(steps_per_second, 1e-9)
        if self._bar is not None:
            epoch = self._epoch(step)
            room = self._bar.console.width - len(f"epoch {epoch}") - _BAR
            figures = [f"loss {loss:.4f}", *measured, f"lr {lr:.2e}", f"{count(images_per_second)} images/s",
                       f"{duration(left)} left"]  # fmt: skip
            shown = fitting(figures, room, [-3, -2, *range(len(measured), 0, -1), -1])
            self._bar.update(self._task, completed=step, epoch=epoch, figures=shown)
            return
        now = time.monotonic()
        # A line every 5 s at first, every 30 s once it is clear that all is well.
        if step < self.total_steps and now - self._printed < (5 if now - self._started < 60 else 30):
            return
        self._printed = now
        self.note(
            f"epoch {self._epoch(step)}  step {step}/{self.total_steps}  {'  '.join([f'loss {loss:.4f}', *measured])}  "
            f"lr {lr:.2e}  {count(images_per_second)} images/s  {duration(left)} left"
        )

    def _epoch(self, step: int) -> str:
        epochs = self.total_steps // self.steps_per_epoch
        return f"{step / self.steps_per_epoch:.1f}/{epochs}"

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        if self._bar is not None:
            text = printable(text, self.stream)
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(text, self.stream)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
