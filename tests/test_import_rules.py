"""Who may import whom, and what `import mimkernels` may not pull in."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mimkernels
import mimkernels.nn

PACKAGE = Path(mimkernels.__file__).parent
CSRC = PACKAGE.parent / "csrc"
ALLOWED = {
    "ops": {"ops"},
    "nn": {"nn", "ops"},
    "heads": {"heads", "nn", "ops"},
    "models": {"models", "nn", "ops"},
    "data": {"data", "ops"},
    "engine": {"engine", "data", "models", "heads", "nn", "ops"},
    "commands": {"commands", "engine", "data", "models", "heads", "nn", "ops"},
    "integrations": {"integrations", "models", "nn", "ops"},
}
HEAVY = ("triton", "timm", "torchvision", "transformers", "matplotlib", "xformers", "accelerate", "sklearn", "PIL")


def imported_parts(file: Path) -> set[str]:
    """Sub-packages of mimkernels that a file imports anywhere; "" is mimkernels itself."""
    package = ["mimkernels", *file.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*origin, *(node.module or "").split(".")]).strip(".")
            # `from mimkernels import ops` imports ops; `from mimkernels import MAE` imports the package's face.
            names += [f"{module}.{alias.name}" if module == "mimkernels" else module for alias in node.names]
    ours = {name for name in names if name.partition(".")[0] == "mimkernels"}
    parts = {name.partition(".")[2].partition(".")[0] for name in ours}
    return {part if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists() else "" for part in parts}


def python_files(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py"))


@pytest.mark.parametrize("part", [part for part in ALLOWED if (PACKAGE / part).exists()])
def test_sub_packages_import_only_what_is_below_them(part):
    # The face of the package is what `ops` and `nn` export: those above them may use it, they themselves may not.
    allowed = ALLOWED[part] | {"_version"} | (set() if part == "ops" else {"", "_options", "_palette"})
    for file in python_files(part):
        beyond = imported_parts(file) - allowed
        assert not beyond, f"{file} imports {sorted(beyond)}; {part} may import {sorted(ALLOWED[part])}"


def test_nobody_imports_the_integrations():
    # The face shows `accelerate` to type checkers; what it imports when it runs, another test below sees.
    for file in python_files(""):
        if file.relative_to(PACKAGE).parts[0] not in ("integrations", "__init__.py"):
            assert "integrations" not in imported_parts(file), file


def modules() -> dict[str, Path]:
    """Every module of the package by its name; a package is its ``__init__.py``."""
    names = {}
    for file in python_files(""):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(["mimkernels", *(parts[:-1] if parts[-1] == "__init__" else parts)])] = file
    return names


def imported_modules(name: str, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, at any depth of its code, but not for type checkers alone."""
    file = known[name]
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    imported = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*origin, *filter(None, [node.module])])
            # `from a import b` imports a.b where that is a module, and a where b is something in it.
            imported.update(
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module for alias in node.names
            )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return imported & known.keys()


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions count: they hide a circle from Python, not from a reader.

    What is imported for type checkers alone does not count, nor do the packages that Python runs on the way to a
    module: ``mimkernels.nn`` may export what its own modules define.
    """
    known = modules()
    graph = {name: imported_modules(name, known) for name in known}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_in_functions_are_seen_and_those_for_type_checkers_are_not(tmp_path):
    known = {f"mimkernels.{name}": tmp_path / f"{name}.py" for name in "abc"}
    known["mimkernels.a"].write_text("def f():\n    from mimkernels import b, __version__\n")
    known["mimkernels.b"].write_text("if TYPE_CHECKING:\n    import mimkernels.c\nelse:\n    from .a import f\n")
    assert imported_modules("mimkernels.a", known) == {"mimkernels.b"}
    assert imported_modules("mimkernels.b", known) == {"mimkernels.a"}


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (PACKAGE / "commands").glob("*/__init__.py")))
def test_a_command_imports_no_other_command(name):
    """But for the demo, which calls the public ``run`` of others with their settings."""
    known = modules()
    own = f"mimkernels.commands.{name}"
    public = re.compile(r"mimkernels\.commands\.(pretrain|probe)\.(run|config)" if name == "demo" else "(?!)")
    for module in known:
        if f"{module}.".startswith(f"{own}."):
            others = {
                other
                for other in imported_modules(module, known)
                if other.startswith("mimkernels.commands.") and not f"{other}.".startswith(f"{own}.")
            }
            beyond = sorted(other for other in others if not public.fullmatch(other))
            assert not beyond, f"{module} imports {beyond}"


def test_the_rules_see_every_form_of_import():
    probe = PACKAGE / "ops" / "gather_tokens" / "probe.py"

    class Text(type(probe)):
        def read_text(self, *args, **kwargs):
            return "from ...nn import a\nfrom mimkernels import heads, MAE\nimport mimkernels.commands.pretrain.loop\n"

    assert imported_parts(Text(probe)) == {"nn", "heads", "", "commands"}


@pytest.mark.parametrize(
    "package, names", [(mimkernels, mimkernels._AT_FIRST_USE), (mimkernels.nn, mimkernels.nn._NEED_TIMM)]
)
def test_what_is_imported_at_first_use_is_shown_to_type_checkers(package, names):
    tree = ast.parse(Path(package.__file__).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    origins = {alias.name: node.module for node in imports for alias in node.names}
    assert origins.keys() == set(names) <= set(package.__all__)
    for name, module in names.items():
        assert origins[name] in (module, f"{package.__name__}.{module}") and getattr(package, name)


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import mimkernels", "import mimkernels.ops, mimkernels.info, mimkernels.cli"])
def test_importing_stays_light(statement):
    # torch itself may import some of these: what counts is what comes on top of it.
    pulled_in = (modules_after(statement) - modules_after("import torch")) & set(HEAVY)
    assert not pulled_in, f"{statement!r} imports {sorted(pulled_in)}"


def includes(folder: str) -> list[tuple[Path, str]]:
    files = [file for file in sorted((CSRC / folder).rglob("*")) if file.is_file()]
    found = [(file, re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', file.read_text(), re.M)) for file in files]
    return [(file, name) for file, names in found for name in names]


def binds(file: Path) -> bool:
    """Whether a file of csrc is one of the bindings: csrc/torch and csrc/ops/<op>/bind*."""
    folder, *_ = file.relative_to(CSRC).parts
    return folder == "torch" or (folder == "ops" and file.name.startswith("bind"))


def is_torch(name: str) -> bool:
    """Whether an include is a header of torch: csrc has a folder of that name, too."""
    return bool(re.match(r"(torch|ATen|c10|caffe2)/", name)) and not (CSRC / name).exists()


def test_only_the_bindings_include_torch():
    for file, name in includes("."):
        if not binds(file):
            assert not is_torch(name) and not name.startswith("torch/"), f"{file} includes {name}"


def test_the_bindings_use_only_the_stable_abi():
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for file, name in includes("."):
        assert not is_torch(name) or name.startswith(stable), f"{file} includes {name}"


def test_shared_and_cpu_sources_need_no_cuda():
    for folder in ("core", "cpu"):
        for file, name in includes(folder):
            assert not name.startswith("cuda"), f"{file} includes {name}"
    for file, name in includes("ops"):
        if file.name.startswith("cpu") or file.name in ("params.h", "bind.h", "bind_cpu.cpp"):
            assert "cuda" not in name, f"{file} includes {name}"


COMPANIONS = ("attention_rows", "head_divergence", "received_attention")  # of attention: they share its scores
OP_FOLDERS = sorted(folder.name for folder in (PACKAGE / "ops").iterdir() if (folder / "api.py").exists())


def ops_imported(file: Path) -> set[str]:
    """Folders of ops that a file of ``mimkernels/ops`` imports, anywhere and in any form."""
    package = ["mimkernels", *file.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*origin, *filter(None, [node.module])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    return {part[2] for part in parts if part[:2] == ["mimkernels", "ops"] and part[2:3] and part[2] in OP_FOLDERS}


@pytest.mark.parametrize("op", OP_FOLDERS)
def test_the_folder_of_an_op_imports_no_other_op(op):
    """Attention's companions excepted; what several ops share is in ``mimkernels/ops/_*.py``."""
    allowed = {op, "attention"} if op in COMPANIONS else {op}
    for file in python_files(f"ops/{op}"):
        others = ops_imported(file) - allowed
        assert not others, f"{file} imports {sorted(others)}"


def test_what_ops_share_imports_no_op():
    for file in sorted((PACKAGE / "ops").glob("_[a-z]*.py")):
        assert not ops_imported(file), f"{file} imports {sorted(ops_imported(file))}"


def test_imports_of_other_ops_are_seen_in_every_form():
    probe = PACKAGE / "ops" / "gather_tokens" / "probe.py"

    class Text(type(probe)):
        def read_text(self, *args, **kwargs):
            return (
                "from mimkernels.ops import bias_gelu, _checks\nfrom ..query_pool.api import query_pool\n"
                "def f():\n    import mimkernels.ops.random_mask.spec\nfrom .. import reduce_pool\nfrom . import api\n"
            )

    seen = {"bias_gelu", "query_pool", "random_mask", "reduce_pool", "gather_tokens"}
    assert ops_imported(Text(probe)) == seen
