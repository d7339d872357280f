"""``python -m benchmarks measure-attention``: what it writes, and what it refuses."""

import json

import pytest

from benchmarks import measure_attention
from benchmarks.measure_attention import main, rendered, replaced
from mimkernels.nn.sdpa.measured import TABLE, checked, instruction_set


def row(**changes):
    texts = {"device": "cpu", "instruction_set": "made", "dtype": "float32", "machine": "", "torch": "", "comment": ""}
    return {**texts, "forward": [[50, 64, 0.5], [50, 32, 0.7], [17, 32, 0.8]], "training": [], **changes}


def test_the_committed_table_is_as_the_command_writes_it():
    assert rendered(json.loads(TABLE.read_text())) == TABLE.read_text()


def test_rows_are_replaced_and_kept_in_order():
    table = {"comment": "", "measured": [row(), row(dtype="bfloat16"), row(instruction_set="avx2")]}
    changed = replaced(table, row(forward=[[8, 8, 1.5]]))
    places = [(one["instruction_set"], one["dtype"], len(one["forward"])) for one in changed["measured"]]
    assert places == [("avx2", "float32", 3), ("made", "bfloat16", 3), ("made", "float32", 1)]
    assert len(table["measured"]) == 3 and len(table["measured"][0]["forward"]) == 3
    assert json.loads(rendered(changed))["measured"][2] == row(forward=[[8, 8, 1.5]])


def test_a_measurement_is_written(tmp_path, monkeypatch, capsys):
    path = tmp_path / "made.json"
    path.write_text(json.dumps({"comment": "kept", "measured": [row()]}))
    monkeypatch.setattr(measure_attention, "CPU_BATCHES", {5: 1, 10: 1})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["--dtypes", "float32", "--dims", "16", "8", "--seconds", "0", "--table", str(path), "--comment", "why"]
    monkeypatch.setattr("sys.argv", ["measure-attention", *arguments])
    assert main() == 0
    table = json.loads(path.read_text())
    assert table["comment"] == "kept" and [one["instruction_set"] for one in table["measured"]][-1] == "made"
    measured, _ = table["measured"]
    assert (measured["instruction_set"], measured["comment"]) == (instruction_set("cpu"), "why")
    sizes = [[5, 8], [10, 8], [5, 16], [10, 16]]
    assert [one[:2] for one in measured["forward"]] == [one[:2] for one in measured["training"]] == sizes
    assert len(checked(table, "made")) == 2
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_a_malformed_table_is_left_alone(tmp_path, monkeypatch, capsys):
    path = tmp_path / "made.json"
    for text, said in (
        ("{", "Expecting property name"),
        (
            json.dumps({"comment": "", "measured": [row(forward=[[50, 64, -1]])]}),
            "measured[0].forward must be positive",
        ),
    ):
        path.write_text(text)
        monkeypatch.setattr("sys.argv", ["measure-attention", "--table", str(path)])
        assert main() == 2
        assert said in capsys.readouterr().err and path.read_text() == text
    monkeypatch.setattr(measure_attention, "instruction_set", lambda device: None)
    assert main() == 2 and "there are no kernels" in capsys.readouterr().err


@pytest.mark.parametrize("points", [[], [[50, 64, 0.5]]])
def test_what_is_written_reads_as_it_was(points):
    table = {"comment": "", "measured": [row(forward=points)]}
    assert json.loads(rendered(table)) == table
