"""Files that survive a crash of their writer and a full disk."""

import os

import pytest

from mimkernels.engine import files
from mimkernels.engine.files import atomic_file


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.pt"
    files.save(path, {"step": 1})
    before = path.read_bytes()

    def crash(value, file):
        file.write(b"half of it")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.save(path, {"step": 2}, writer=crash)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file.pt"]


def test_the_name_appears_only_once_the_content_is_whole(tmp_path):
    path = tmp_path / "file"
    with atomic_file(path) as file:
        file.write(b"all")
        assert not path.exists()
    assert path.read_bytes() == b"all"
