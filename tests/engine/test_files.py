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


def test_a_line_of_a_log_is_json_whatever_its_numbers_and_reads_as_nan(tmp_path):
    entry = {"step": 3, "loss": 0.5, "grad_norm": math.inf, "heads": {"grid": None, "sum": [1.0, math.nan]}}
    line = files.json_line(entry)
    json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    (tmp_path / "log.jsonl").write_text(line)
    (read,) = files.read_entries(tmp_path / "log.jsonl", lambda _: True)
    assert (read["step"], read["loss"], read["heads"]["sum"][0]) == (3, 0.5, 1.0)
    assert read["heads"]["grid"] is None
    assert math.isnan(read["grad_norm"]) and math.isnan(read["heads"]["sum"][1])


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
