"""One run at a time in a folder: a lock that the kernel releases when its process dies, however it dies."""

import contextlib
import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

NAME = ".lock"

_HELD: set[int] = set()  # descriptors of the locks of this process


@contextlib.contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for this process alone; it is made if need be, and removed again if nothing was put into it.

    The lock is ``flock`` on a file in the folder, which says who holds it and disappears with the lock. After a crash
    the file stays, unlocked, and is of no consequence. Where the file system knows no locks, a warning says so.

    Raises:
        ValueError: a running process holds the folder (says its number, host and when it began), or it cannot be made.
        OSError: the file cannot be opened.
    """
    folder = Path(folder)
    missing = [place for place in (folder.absolute(), *folder.absolute().parents) if not place.exists()]
    descriptor = _acquire(folder)
    owner = os.getpid()
    _HELD.add(descriptor)
    try:
        yield
    finally:
        if owner == os.getpid():
            # The file goes while it is still locked: whoever waits for its name then finds none, or a new one.
            with contextlib.suppress(OSError):
                os.unlink(folder / NAME)
            _HELD.discard(descriptor)
            os.close(descriptor)
            with contextlib.suppress(OSError):  # not empty
                for place in missing:
                    place.rmdir()


def _acquire(folder: Path) -> int:
    path = folder / NAME
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"output {str(folder)!r} cannot be made: {e.strerror or e}") from e
        try:
            # A link here would let a folder from elsewhere choose what is written to.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another run ended just now, and took its empty folder with it
            continue
        try:
            _lock(descriptor, folder)
            if _is_named(descriptor, path):
                os.ftruncate(descriptor, 0)
                began = time.strftime("%Y-%m-%d %H:%M:%S")
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {began}".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a run that ended between the two calls: its file has lost its name


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            warnings.warn(
                f"the file system of {str(folder)!r} has no locks ({e.strerror}): start no other run there",
                stacklevel=2,
            )
            return
        holder = os.pread(descriptor, 500, 0).decode(errors="replace").strip() or "another process"
        raise ValueError(
            f"output {str(folder)!r} is in use by {holder}: wait until it ends, or choose another --output"
        ) from None


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _forget_in_child() -> None:
    # Data-loading workers are forks: they would hold the lock for as long as they outlive a killed run.
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_in_child)
