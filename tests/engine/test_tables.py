import io
import re

from mimkernels.engine.tables import print_table

COLUMNS = ["pooling", "accuracy", "verdict"]
ROWS = [["cls", "9.1 %", "SLOWER"], ["[bold]mean[/] of all tokens", "90.0 %", ""]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_columns_are_aligned_and_text_is_taken_as_it_is():
    stream = io.StringIO()
    print_table(COLUMNS, ROWS, title="A title", left=(0, 2), bold=(1,), stream=stream)
    assert stream.getvalue().splitlines() == [
        "A title",
        "pooling                      accuracy  verdict",
        "cls                             9.1 %  SLOWER",
        "[bold]mean[/] of all tokens    90.0 %",
    ]


def test_a_file_gets_every_row_on_one_line_however_long():
    stream = io.StringIO()
    print_table(["case", "ms"], [["x" * 300, "1.0"]], stream=stream)
    assert stream.getvalue().splitlines()[1] == "x" * 300 + "  1.0"


def test_a_terminal_folds_the_first_column_and_shows_rows_that_stand_out(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    print_table(["case", "ms"], [["x" * 60, "1.0"], ["y", "2.0"]], bold=(1,), stream=stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4 and "\x1b[1m" in lines[-1] and "\x1b[1m" not in lines[1]


def test_a_narrow_terminal_shows_every_figure_whole_beside_the_name_of_its_row(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    names = [f"score {number}" for number in range(9)]
    rows = [["a model", "12", *(f"{number}.125 %" for number in range(9))], ["b", "6", *["-"] * 9]]
    print_table(["model", "layer", *names], rows, title="A title", left=(0, 1), stream=stream)
    shown = _plain(stream)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 40 and lines[0].strip() == "A title"
    figures = [word for line in lines if line.startswith("a model") for word in line.split()[3:] if word != "%"]
    assert shown.count("\n\n") > 1 and figures == [f"{number}.125" for number in range(9)]
    print_table(["layer", "rate", "such as"], [["0", "1e-3", "name, " * 20]], left=(0, 2), stream=stream)
    assert max(map(len, _plain(stream).splitlines())) <= 40 and _plain(stream).count("name,") == 20


def _plain(stream):
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


def test_what_the_stream_cannot_show_is_escaped():
    shown = io.BytesIO()
    stream = io.TextIOWrapper(shown, encoding="ascii")
    print_table(["a"], [["1 ± 2"]], stream=stream)
    assert rb"1 \xb1 2" in shown.getvalue()
