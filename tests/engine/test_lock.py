"""One run at a time in a folder, however the one before it ended."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from mimkernels.commands.pretrain.history import read_entries
from mimkernels.commands.pretrain.loop import Trainer
from mimkernels.commands.pretrain.run import Run, pretrain
from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.commands.probe.run import probe
from mimkernels.engine.checkpoint import load
from mimkernels.engine.lock import folder_lock


def in_use(by: int | None = None) -> str:
    return rf"is in use by process {by or os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-.*--output"


def test_a_second_run_is_refused_and_the_first_unharmed(tiny, tmp_path, monkeypatch):
    pretrain(tiny(epochs=2, output=str(tmp_path / "alone")))
    config, refused = tiny(epochs=2, save_every=0.4), []
    step = Trainer._train_step

    def meanwhile(self, batches):
        if self.step == 3:
            for options in ({}, {"overwrite": True}, {"resume": "auto"}):
                with pytest.raises(ValueError, match=in_use()) as caught:
                    pretrain(tiny(epochs=2, seed=1 if "overwrite" in options else 0), **options)
                refused.append(str(caught.value))
        step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", meanwhile)
    pretrain(config)
    assert len(refused) == 3 and str(tmp_path / "run") in refused[0]
    runs = [tmp_path / name for name in ("alone", "run")]
    one, other = (load(run / "checkpoints" / "final.pt")["model"] for run in runs)
    assert all((one[name] == other[name]).all() for name in one)
    assert [entry["loss"] for entry in read_entries(runs[0] / "metrics.jsonl")] == [
        entry["loss"] for entry in read_entries(runs[1] / "metrics.jsonl")
    ]
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_second_probe_is_refused(tiny, tmp_path):
    config = ProbeConfig(model="vit_tiny_patch16_224", pretrained=False, output=str(tmp_path / "probe"))
    with folder_lock(config.output), pytest.raises(ValueError, match=in_use()):
        probe(config)
    assert not (tmp_path / "probe").exists()


def test_of_several_processes_only_the_first_locks(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with folder_lock(tmp_path / "run"):
        Run(tiny())


def test_a_refused_run_leaves_no_folder_and_no_lock(tiny, tmp_path):
    with pytest.raises(ValueError, match="timm has no model"):
        pretrain(tiny(model="vit_nothing", output=str(tmp_path / "a" / "b")))
    assert os.listdir(tmp_path) == []
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="timm has no model"):
        pretrain(tiny(model="vit_nothing"))
    assert os.listdir(tmp_path / "run") == []


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


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="has no locks .*start no other run there"), folder_lock(tmp_path / "run"):
        pass


def test_the_command_says_who_is_at_work(tmp_path):
    with folder_lock(tmp_path / "run"):
        done = subprocess.run(
            [sys.executable, "-m", "mimkernels", "pretrain", "--data", "digits", "--output", str(tmp_path / "run")],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(in_use(), done.stderr) and done.stderr.startswith("mimkernels: error: output")
