import os

import pytest
import torch

from mimkernels.engine import files
from mimkernels.engine.checkpoint import CheckpointFolder, load


def content(step: int) -> dict:
    return {"format": 1, "step": step, "optimizer": {}, "model": {"w": torch.full((3,), float(step))}, "config": {}}


def test_the_newest_are_kept_and_the_final_one(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (5, 10, 15):
        folder.save(content(step))
    assert folder.steps() == [10, 15]
    assert folder.latest() == folder.path(15)
    folder.save(content(20), final=True)
    assert folder.steps() == [10, 15]
    assert folder.latest() == folder.final
    folder.reopen(20)
    assert folder.steps() == [10, 15, 20] and not folder.final.exists()


def test_a_damaged_file_is_refused_by_name(tmp_path):
    path = tmp_path / "step-00000001.pt"
    files.save(path, content(1))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"step-00000001\.pt.*cannot be read"):
        load(path)


def test_another_kind_of_file_is_refused_showing_what_it_holds(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": {"w": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"not a checkpoint.*found \['model'\]"):
        load(path)


def test_code_in_a_checkpoint_never_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = tmp_path / "evil.pt"
    torch.save({**content(1), "extra": Evil()}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        load(path)
    assert not (tmp_path / "ran").exists()
