"""Several runs of the trainer by the same processes: the start of a process takes most of the time of a small run.

torchrun --nproc-per-node 2 -m tests.commands.pretrain.in_turn --output one --epochs 2 then --output two

After ``then`` come the words of the next run, or ``copy FOLDER OTHER``, a run without its last checkpoint. A run that
fails ends it. Each part is announced by a line ``in turn: WORDS``.
"""

import itertools
import os
import shutil
import sys

import torch

from mimkernels.cli import main


def in_turn(words: list[str]) -> int:
    """Status of the first run that fails, else 0."""
    for then, words_of_part in itertools.groupby(words, "then".__eq__):
        if then:
            continue
        part = list(words_of_part)
        if os.environ["RANK"] == "0":
            print("in turn:", *part, flush=True)
        if part[0] == "copy":
            copy(*part[1:])
        elif status := main(["pretrain", *part]):
            return status
    return 0


def copy(folder: str, other: str) -> None:
    """A copy, made before any process looks at it, of a run that has not come to its end."""
    if os.environ["RANK"] == "0":
        shutil.copytree(folder, other, ignore=shutil.ignore_patterns("final.pt"))
    torch.distributed.barrier()


if __name__ == "__main__":
    sys.exit(in_turn(sys.argv[1:]))
