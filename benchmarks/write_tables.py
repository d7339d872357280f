"""Writes the tables of README and site: ``python -m benchmarks write-tables`` (``--check`` only compares).

Measured figures come from the JSON under ``benchmarks/results/``, each folder headed by its device's name; options of
commands come from their parsers. Tables stand between two marks in their files, everything else there is by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.gpu_stages.reader import report
from benchmarks.gpu_stages.target import read
from mimkernels.cli import COMMANDS, build_parser
from mimkernels.commands.bench.results import read_reports
from mimkernels.commands.bench.tables import all_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- python -m benchmarks write-tables -->\n", "<!-- end of tables -->\n"

# README's table: a case, where its report calls it otherwise the words for it, and what it is compared with.
HEADLINES = (
    ("gathering-float32", "mask + gather", "", "random masks and the gather of visible tokens", "plain"),
    ("gathering-float32", "patchify_gather of uint8, normalised", "", "pixels of visible patches, from uint8", "plain"),
    ("gathering-float32", "masked_patch_loss, forward + backward", "", "loss on masked patches", "plain"),
    ("pooling-float32", "query_pool, AbMILP, forward + backward", "", "AbMILP pooling", "plain"),
    ("attention-float32", "attention, forward + backward", "B=8 H=12 N=197 D=64",
     "attention with all head statistics", "sdpa"),
    ("step-float32", "MAE step, with data loading", "vit_base_patch16_224 B=8",
     "a whole MAE step with data loading, ViT-B", "plain"),
)  # fmt: skip
AGAINST = {"plain": "plain PyTorch", "sdpa": "SDPA, which gives none"}


def reports_by_device() -> Iterator[dict[str, dict]]:
    """The reports of every device, by group and dtype ("gathering-float32")."""
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    return (reports for reports in map(read_reports, folders) if reports)


def headlines() -> str:
    """A few cases of every device."""
    tables = []
    for reports in reports_by_device():
        about = next(iter(reports.values()))["machine"]
        lines = [
            f"| {about['device']}, {about['threads']} threads, fp32 | compared with | times as fast |",
            "|---|---|---|",
        ]
        for group, name, shape, words, other in HEADLINES:
            records = [r for r in reports.get(group, {}).get("results", ()) if r["name"] == name]
            for record in [r for r in records if shape in ("", r["shape"])][:1]:
                against = "the published code" if group.startswith("step") else AGAINST[other]
                ratio = record["median_us"][other] / record["median_us"]["ours"]
                lines.append(f"| {words} | {against} | {ratio:.{1 if ratio >= 2 else 2}f} |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def figures() -> str:
    """Every case of every device, and what runs on GPUs said."""
    runs = sorted(RESULTS.glob("*/results.jsonl"))
    # One level below the page's headings.
    reports = [re.sub(r"^#", "##", report(read(run)), flags=re.MULTILINE) + "\n" for run in runs]
    return "\n".join([*(all_tables(reports) for reports in reports_by_device()), *reports])


def options() -> str:
    """Every command with its options, in the groups of its ``--help``."""
    parts = []
    for name in COMMANDS:
        parser = _choices(build_parser(name))[name]
        nested = _choices(parser)
        for full, each in (
            {f"{name} {key}": value for key, value in nested.items()}.items() if nested else [(name, parser)]
        ):
            parts.append(f"## mimkernels {full}\n\n{each.description or COMMANDS[name].help}\n\n{_table(each)}")
    return "\n".join(parts)


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The subcommands of a parser by name."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def _table(parser: argparse.ArgumentParser) -> str:
    lines = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions and group.title not in ("options", "positional arguments"):
            lines += ["", f"**{group.title}**"]
        if actions:
            lines += ["", "| option | is |", "|---|---|"]
            lines += [f"| {_invocation(parser, action)} | {_cell(parser, action)} |" for action in actions]
    return "\n".join(lines[1:]) + "\n"


def _invocation(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else parser._get_formatter()._format_args(action, action.dest.upper())
    names = ", ".join(action.option_strings)
    # Python-Markdown shows the backslash of an escaped bar in code.
    return "`" + " ".join(filter(None, (names, value))).replace("|", " or ") + "`"


def _cell(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    return markdown(text.replace("\n", " "))


def markdown(text: str) -> str:
    """Plain text as a cell of a table: options, names and patterns become code, so that no sign of them is lost."""
    parts = text.split("`")  # every second one is code already
    parts[::2] = [re.sub(r"\S+", _word, part) for part in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


def _word(found: re.Match) -> str:
    before, core, after = re.fullmatch(r"([(]*)(.*?)([.,;:)]*)", found[0]).groups()
    if core == "*":
        return "\\*"
    is_code = core.startswith("--") or set(core) & set("_*<") or re.search(r"\w=\S", core)
    return f"{before}`{core}`{after}" if is_code else found[0]


TABLES: dict[Path, Callable[[], str]] = {
    ROOT / "README.md": headlines,
    ROOT / "docs" / "performance.md": figures,
    ROOT / "docs" / "reference" / "commands.md": options,
}


def with_tables(path: Path, tables: str) -> str:
    """The file with ``tables`` between its two marks.

    Raises:
        ValueError: it lacks them.
    """
    before, found, rest = path.read_text().partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{path.name} lacks the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return before + BEGIN + "\n" + tables.strip("\n") + "\n\n" + END + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file is behind")
    check = parser.parse_args().check
    behind = [(path, text) for path, make in TABLES.items() if (text := with_tables(path, make())) != path.read_text()]
    for path, text in behind:
        if check:
            print(f"{path.relative_to(ROOT)} is behind; run python -m benchmarks write-tables", file=sys.stderr)
        else:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if check and behind else 0


if __name__ == "__main__":
    sys.exit(main())
