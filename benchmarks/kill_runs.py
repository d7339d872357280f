"""Kills a pre-training again and again, compares its bits: ``python -m benchmarks kill-runs --kills 50``.

Resumed after each kill, it must end with the bits of a run that was left alone.
A small pre-training on the digits saves a checkpoint after every second step. Half of the kills hit it while a
checkpoint is being written (its temporary file has been seen), the others at any moment after its first line of output.
Each is followed by ``--resume auto``. At the end weights, optimizer and logged losses equal those of the undisturbed
run, bit for bit, and the folder holds the same files (TensorBoard's aside: one for every start). Exit status 1 if not.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

_SETTINGS = [
    "--data", "digits", "--img-size", "8", "--in-chans", "1", "--patch-size", "4", "--model-kwargs", "embed_dim=192",
    "depth=4", "num_heads=3", "--decoder-dim", "64", "--decoder-depth", "1", "--decoder-heads", "2", "--batch-size",
    "100", "--epochs", "10", "--save-every", "0.14", "--log-every", "1", "--workers", "1", "--device", "cpu",
    "--precision", "fp32", "--pictures", "0",
]  # fmt: skip


def _pretrain(words: list[str], log: str) -> None:
    # Written through to the file at once: what a killed process had said is there.
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    multiprocessing.set_start_method("fork", force=True)  # of data-loading workers, as in a process of its own
    from mimkernels.cli import main

    sys.exit(main(["pretrain", *_SETTINGS, *words]))


class Runs:
    """Starts pre-training in processes of its own; what they import is imported once, before the first."""

    def __init__(self, folder: Path) -> None:
        self.output, self.log = folder / "killed", folder / "killed.log"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["mimkernels.commands.pretrain.run", "mimkernels.models"])

    def start(self, output: Path) -> multiprocessing.Process:
        process = self.context.Process(
            target=_pretrain, args=(["--output", str(output), "--resume", "auto"], str(self.log)), daemon=False
        )
        process.start()
        return process

    def kill_while_writing(self, process: multiprocessing.Process, number: int) -> bool:
        """Kill while the ``number``-th checkpoint is written; True if its temporary file was left behind."""
        folder, seen = self.output / "checkpoints", set()
        while process.is_alive():
            writing = {path.name for path in folder.glob(".step-*.tmp")} if folder.is_dir() else set()
            seen |= writing
            if len(seen) >= number and writing:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                return any(folder.glob(".step-*.tmp"))
        return False

    def kill_after(self, process: multiprocessing.Process, seconds: float) -> None:
        """Kill so long after the process has said its first line."""
        said = self.log.stat().st_size if self.log.exists() else 0
        while process.is_alive() and (not self.log.exists() or self.log.stat().st_size == said):
            time.sleep(0.005)
        time.sleep(seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()


def _files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith("tensorboard/"))


def _same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _losses(folder: Path) -> list[tuple[int, float]]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(entry["step"], entry["loss"]) for entry in entries]


def compare(whole: Path, killed: Path) -> list[str]:
    """What differs between the two run folders."""
    one, other = (
        torch.load(folder / "checkpoints" / "final.pt", map_location="cpu", weights_only=True)
        for folder in (whole, killed)
    )
    differences = [f"{part} differs" for part in ("step", "model", "optimizer") if not _same(one[part], other[part])]
    if _losses(whole) != _losses(killed):
        differences.append("losses differ")
    if _files(whole) != _files(killed):
        differences.append(f"files differ: {sorted(set(_files(whole)) ^ set(_files(killed)))}")
    return differences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments of the kills")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        runs = Runs(folder)
        began = time.monotonic()
        whole = runs.start(folder / "whole")
        whole.join()
        print(f"undisturbed: exit status {whole.exitcode}, {time.monotonic() - began:.0f} s", flush=True)
        kills = left = ended = 0
        for number in range(args.kills):
            process = runs.start(runs.output)
            if number % 2:
                runs.kill_after(process, rng.uniform(0, 2))
            else:
                left += runs.kill_while_writing(process, rng.choice((1, 2, 3)))
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            ended += process.exitcode == 0
            if process.exitcode not in (0, -signal.SIGKILL):
                print(f"a resumed run ended with status {process.exitcode}:\n{runs.log.read_text()[-2000:]}")
                return 1
            if number % 10 == 9:
                steps = sorted(path.name for path in (runs.output / "checkpoints").glob("*.pt"))
                print(f"{number + 1} starts, {kills} killed; newest checkpoint {steps[-1]}", flush=True)
        last = runs.start(runs.output)
        last.join()
        differences = compare(folder / "whole", runs.output) if last.exitcode == 0 else ["the last run failed"]
        print(
            f"{kills} kills, {left} of them left a half-written checkpoint; {ended} starts came to their end before; "
            f"{time.monotonic() - began:.0f} s\n" + ("; ".join(differences) or "same bits, same files")
        )
    return 1 if differences or kills < args.kills else 0
