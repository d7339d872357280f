"""Every example of README, site and docstrings runs, and every command that they show exists."""

import ast
import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

timm = pytest.importorskip("timm")

import mimkernels  # noqa: E402
from benchmarks.__main__ import tools  # noqa: E402
from mimkernels import heads, nn  # noqa: E402
from mimkernels.cli import build_parser  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mimkernels"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ARGUMENTS = {"capture_timm.py": ["--random-weights", "--batches", "1"]}


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Fenced code of a page: the number of its first line, and the code."""
    found, start, lines = [], None, page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if start is None and line == f"```{language}":
            start = number + 1
        elif start is not None and line == "```":
            found.append((start, "\n".join(lines[start - 1 : number - 1])))
            start = None
    assert start is None, f"{page}: a block is not closed"
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


PYTHON_PAGES = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Files go to an empty folder, weights are random, and large encoders are two blocks deep; nothing is
    compiled for the machine."""
    create = timm.create_model

    def create_small(name, *args, pretrained=False, **kwargs):
        return create(name, *args, **({"depth": 2} if name.startswith("vit_base") else {}), **kwargs)

    monkeypatch.setattr(timm, "create_model", create_small)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_python_of_a_page_runs(page, small):
    names = {"__name__": "example"}
    for line, code in blocks(page, "python"):
        if code.startswith("--8<--"):
            continue  # a file of examples/, which has a test of its own
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def test_included_files_are_examples():
    shown = [code for _, code in blocks(ROOT / "docs" / "howto" / "examples.md", "python")]
    assert sorted(shown) == sorted(f'--8<-- "{name_of(example)}"' for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_example_runs(example, tmp_path):
    command = [sys.executable, str(example), *ARGUMENTS.get(example.name, ())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def commands() -> list[tuple[str, str]]:
    """Every command line of the pages: lines of shell blocks, and what stands in backticks and is one."""
    found = []
    for page in PAGES:
        for _, code in blocks(page, "sh"):
            lines = code.replace("\\\n", " ").splitlines()
            found += [(name_of(page), line.partition("#")[0].strip()) for line in lines]
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        inline = re.findall(r"`((?:mimkernels|make|python|pytest|pip) [^`]+)`", prose)
        found += [(name_of(page), line) for line in inline if "|" not in line and "..." not in line]
    return [(page, line) for page, line in dict.fromkeys(found) if line]


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value)
def test_command_exists(page, line):
    words = shlex.split(line)
    while words and re.fullmatch(r"[A-Z_]+=.+", words[0]):
        words.pop(0)
    if words[:4] == ["accelerate", "launch", "-m", "mimkernels"] or words[:3] == ["torchrun", "-m", "mimkernels"]:
        words = words[words.index("mimkernels") :]
    program, *rest = words
    if program == "mimkernels":
        if len(rest) == 1 or rest == ["bench", "plot"] or rest == ["bench", "run"]:
            assert rest[0] in build_parser(rest[0]).format_help()
        else:
            build_parser(rest[0]).parse_args(rest)  # exits where an option is unknown
    elif program == "make":
        targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.M)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program == "python" and rest[:2] == ["-m", "benchmarks"]:
        assert rest[2] in tools()
    elif program == "python" and rest[0] == "-m":
        module = ROOT / rest[1].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
    elif program == "python":
        assert (ROOT / rest[0]).is_file()
    elif program == "pytest":
        assert (ROOT / rest[0]).exists()
    else:
        assert program == "pip" and rest[0] == "install"


def documented() -> list[tuple[str, str, str]]:
    """Module, name and code of every docstring that gives an example after ``Example::``."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        source = file.read_text()
        if "Example::" not in source and ">>>" not in source:
            continue
        tree = ast.parse(source)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in (node for node in ast.walk(tree) if isinstance(node, kinds)):
            text = ast.get_docstring(node) or ""
            assert ">>>" not in text, f"{module}: examples are written after Example::"
            _, given, after = text.partition("Example::\n")
            if given:
                code = re.match(r"(?:\n|    .*\n?)+", after).group()
                found.append(
                    (module, getattr(node, "name", "module"), "\n".join(line[4:] for line in code.splitlines()))
                )
    return found


def common_names() -> dict:
    """What the examples of docstrings take as given."""
    names = {}
    for module in (mimkernels, heads, nn):
        names |= {name: getattr(module, name) for name in module.__all__}
    encoder = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
    nn.use_mimkernels_attention(encoder)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad(), heads.record_heads(encoder, keep=("q", "k", "lse")) as recorded:
        encoder(images)
    crops = [torch.randn(2, 5, 2, 16), torch.randn(3, 7, 2, 16)]
    q, k, v = torch.randn(3, 1, 2 * 5 + 3 * 7, 2, 16).unbind(0)
    return {
        **names, "torch": torch, "timm": timm, "mimkernels": mimkernels, "model": encoder, "encoder": encoder,
        "images": images, "labels": torch.tensor([1, 2]), "criterion": torch.nn.functional.cross_entropy,
        "loader": [images], "layers": [tuple(torch.randn(3, 2, 4, 197, 16)) for _ in range(2)],
        "layer": recorded[0], "pooling": nn.build_pooling("attn-mn", 192, 1),
        "features_of_each_layer": lambda images: [torch.randn(4, 17, 8) for _ in range(2)],
        "crops_a": crops[0], "crops_b": crops[1], "q": q, "k": k, "v": v,
        "name": "google/vit", "ViTModel": SimpleNamespace(from_pretrained=small_vit),
    }  # fmt: skip


def small_vit(name: str, attn_implementation: str):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(num_hidden_layers=1, hidden_size=48, num_attention_heads=3, intermediate_size=96)
    model = ViTModel(config)
    model.set_attn_implementation(attn_implementation)
    return model


@pytest.mark.parametrize(
    ("module", "name", "code"), documented(), ids=lambda value: value if value.isidentifier() else ""
)
def test_example_of_a_docstring_runs(module, name, code, small):
    names = {**common_names(), **vars(importlib.import_module(module))}
    exec(compile(code, f"{module}.{name}", "exec"), names)
