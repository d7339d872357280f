"""A lock on a folder: held by one process, gone with it however it ends."""

import multiprocessing
import os
import re
import signal
import socket
import time

import pytest

from mimkernels.engine.lock import folder_lock


def in_use(by: int | None = None) -> str:
    return rf"is in use by process {by or os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-.*--output"


def hold(folder, ready):
    with folder_lock(folder):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()  # as a data loader's, which outlives a killed run for a while
        ready.send(worker.pid)
        time.sleep(60)


def test_the_lock_ends_with_its_process_though_its_workers_live_on(tmp_path):
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "run", there))
    process.start()
    worker = here.recv()
    try:
        with pytest.raises(ValueError, match=in_use(process.pid)), folder_lock(tmp_path / "run"):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert (tmp_path / "run" / ".lock").exists()
        with folder_lock(tmp_path / "run"):
            assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()
        assert not (tmp_path / "run" / ".lock").exists()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("content")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious)
    with pytest.raises(OSError, match="lock"), folder_lock(tmp_path / "run"):
        pass
    assert precious.read_text() == "content"


def test_a_folder_that_cannot_be_made_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match=f"^output '{re.escape(place)}' cannot be made: Not a directory"):
        with folder_lock(place):
            pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="has no locks .*start no other run there"), folder_lock(tmp_path / "run"):
        pass
