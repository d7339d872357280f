"""Files that survive a crash of their writer and a full disk."""

import json
import math
import os

import pytest
import torch

from mimkernels.engine import files
from mimkernels.engine.files import atomic_file


def test_numbers_that_json_has_not_become_null():
    values = {"a": [math.nan, 1.5, -math.inf], "b": (torch.tensor([0.5, math.nan]), "nan", True, None, 3)}
    plain = files.json_numbers(values)
    assert plain == {"a": [None, 1.5, None], "b": [[0.5, None], "nan", True, None, 3]}
    json.dumps(plain, allow_nan=False)


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
