"""What is inside the libraries and the wheels, and what an installation does where something is missing."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mimkernels.ops import _native

ROOT = Path(__file__).resolve().parent.parent
ISAS = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"}  # and, for tests, stand-ins in source trees
MASKS = f"mimkernels_masks{sysconfig.get_config_var('EXT_SUFFIX')}"
BUILT = [library for library in _native.libraries() if library.path.exists()]

# Sources that build in seconds and say who they are.
STUB = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <string>
std::string cpu_isa() { return "stub"; }
STABLE_TORCH_LIBRARY_FRAGMENT(mimkernels, m) { m.def("cpu_isa() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(mimkernels, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
"""


def test_the_cpu_library_is_here():
    library = _native.library("cpu")
    assert library.loaded, f"{library.reason}; {library.remedy}"
    assert library.isa in library.build["isas"]


# What is inside the libraries.


def symbols(library: _native.NativeLibrary) -> list[tuple[str, str]]:
    """(kind, demangled name) of every dynamic symbol."""
    lines = subprocess.run(["nm", "-DC", library.path], capture_output=True, text=True, check=True).stdout
    return [tuple(match) for match in re.findall(r"^[ 0-9a-f]* ([A-Za-z]) (.*)$", lines, re.M)]


@pytest.mark.parametrize("library", BUILT, ids=lambda library: library.name)
def test_only_the_stable_abi_is_used(library):
    undefined = [name for kind, name in symbols(library) if kind in "Uw"]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    unstable = [name for name in undefined if re.search(r"\b(at|c10|caffe2|torch)::", name)]
    assert not unstable, f"{library.path.name} needs {unstable}"


@pytest.mark.parametrize("library", BUILT, ids=lambda library: library.name)
def test_nothing_is_exported(library):
    exported = [name for kind, name in symbols(library) if kind not in "Uw"]
    assert not exported, f"{library.path.name} exports {exported}"


def functions(path: Path):
    """(demangled name, disassembly) of every function of a library."""
    command = ["objdump", "-dC", "--no-show-raw-insn", "-j", ".text", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", text, flags=re.M)[1:]
    return zip(parts[::2], parts[1::2], strict=True)


def test_every_function_stays_within_its_instruction_set():
    """A wide instruction outside the namespace of its instruction set stops a CPU that has none.

    That happens when an inline function of the standard library, or ours, is compiled for several instruction
    sets and the linker keeps the wide one for all.
    """
    vex = re.compile(r"\t(v[a-z0-9]{3,}|shlx|shrx|sarx|rorx|mulx|andn|bextr|pdep|pext|blsr|blsi|blsmsk|lzcnt)\s")
    evex = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]")
    library = _native.library("cpu")
    if set(library.build["isas"]) == {"portable"}:
        return
    seen = Counter()
    for name, body in functions(library.path):
        namespaces = set(re.findall(r"\bmimkernels::((?:avx|amx)\w+|emulation::amx)::", name))
        if not namespaces:
            assert not vex.search(body), f"{name} uses {vex.search(body).group().strip()}"
        if not namespaces & {"avx512", "avx512_bf16", "amx_bf16"}:
            assert not evex.search(body), f"{name} uses {evex.search(body).group()}"
        for namespace in namespaces:
            seen[namespace] += bool(vex.search(body))
    built = set(library.build["isas"]) - {"portable"}
    assert built < ISAS and all(seen[isa] for isa in built), f"functions with wide instructions: {seen}"


def test_the_cuda_library_holds_every_architecture_that_it_is_built_for():
    library = _native.library("cuda")
    if not library.build.get("nvcc"):
        assert "nvcc" in library.reason
        return
    assert library.path.exists(), f"nvcc is here, but: {library.reason}"
    tool = shutil.which("cuobjdump")
    if not tool:
        import triton

        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    command = [tool, "--list-elf", "--list-ptx", library.path]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = library.build["cuda_architectures"].split()
    cubins = {f"sm_{name.removesuffix('-real')}.cubin" for name in names if not name.endswith("-virtual")}
    assert names[0] in ("80", "80-virtual")
    assert {*cubins, "sm_80.ptx"} <= set(re.findall(r"sm_\w+\.\w+", listed))


def test_the_cuda_library_is_refused_by_name_under_a_torch_without_cuda():
    library = _native.library("cuda")
    if library.path.exists():
        needed = subprocess.run(["readelf", "-d", library.path], capture_output=True, text=True, check=True).stdout
        assert "libtorch_cuda.so" in needed
        assert "libcudart" not in needed, "cudart is linked statically"


# States of a library, without one.


def test_a_broken_library_is_a_reason(tmp_path):
    broken = tmp_path / "libmimkernels_cpu.so"
    broken.write_bytes(b"no library")
    state = _native._load(_native.NativeLibrary("cpu", broken))
    assert not state.loaded and "does not load" in state.reason and state.remedy


def test_an_older_torch_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "libmimkernels_cpu.so").write_bytes(b"")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    state = _native._load(_native.NativeLibrary("cpu", tmp_path / "libmimkernels_cpu.so"))
    assert not state.loaded and "2.10" in state.reason and "2.9.1" in state.reason


def test_a_torch_without_cuda_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "libmimkernels_cuda.so").write_bytes(b"")
    monkeypatch.setattr(torch.version, "cuda", None)
    state = _native._load(_native.NativeLibrary("cuda", tmp_path / "libmimkernels_cuda.so"))
    assert not state.loaded and "without CUDA" in state.reason and state.remedy


def test_a_tree_that_was_never_installed_is_a_reason(tmp_path):
    state = _native._load(_native.NativeLibrary("cpu", tmp_path / "libmimkernels_cpu.so"))
    assert "never installed" in state.reason and "make build" in state.remedy


def test_a_tree_that_hides_an_installed_package_says_so(tmp_path, monkeypatch):
    """Python imports the tree in its own folder: `pip install .` there changes nothing that is seen from there."""
    package = tmp_path / "mimkernels"
    package.mkdir()
    trees = [_native.FOLDER.parents[1], tmp_path]  # the tree's own metadata comes first
    found = [SimpleNamespace(locate_file=tree.joinpath) for tree in trees]
    monkeypatch.setattr(_native.metadata, "distributions", lambda name: found)
    state = _native._load(_native.NativeLibrary("cpu", tmp_path / "libmimkernels_cpu.so"))
    assert state.reason == f"not built: this source tree was never installed, and hides {package}, which is"
    assert state.remedy.startswith("run in another folder than the clone")


# Installing.


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the sources, with what earlier builds may have left in it."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "mimkernels", tree / "mimkernels", ignore=shutil.ignore_patterns("_lib", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("benchmarks", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=lambda _, names: {n for n in names if not n.endswith(".py")})
    for name in ("core", "masks"):  # the module of mask samplers builds in seconds, too
        shutil.copytree(ROOT / "csrc" / name, tree / "csrc" / name)
    (tree / "csrc" / "torch").mkdir(parents=True)
    (tree / "csrc" / "torch" / "cpu_library.cpp").write_text(STUB)
    for stale in (
        "build/lib/mimkernels/stale.py",
        "build/lib.linux-x86_64-cpython-311/mimkernels/stale.py",
        "mimkernels/_lib/mimkernels_masks.cpython-399-stale.so",
        "mimkernels/_lib/libmimkernels_cuda.so",
        "mimkernels/_lib/libmimkernels_cuda_emulated.so",
        "mimkernels/_lib/libstale.so",
    ):
        (tree / stale).parent.mkdir(parents=True, exist_ok=True)
        (tree / stale).write_text("")
    return tree


def build_wheel(tree: Path, **variables: str) -> subprocess.CompletedProcess:
    """What pip runs to make a wheel, into tree/wheels."""
    unset = ("MIMKERNELS_BUILD", "MIMKERNELS_BUILD_DIR", "MIMKERNELS_TORCH_DIR")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    env |= {"MIMKERNELS_CMAKE_ARGS": "-DMIMKERNELS_CUDA=off", **variables}
    code = "from setuptools import build_meta; build_meta.build_wheel('wheels')"
    return subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True)


def unpack(tree: Path) -> tuple[str, Path, dict]:
    """Name of the wheel, folder of its contents, its build.json."""
    (wheel,) = (tree / "wheels").glob("*.whl")
    folder = tree.parent / "unpacked"
    zipfile.ZipFile(wheel).extractall(folder)
    return wheel.name, folder, json.loads((folder / "mimkernels/_lib/build.json").read_text())


def library_state(folder: Path, name: str = "cpu") -> dict:
    """State of a library as the unpacked package reports it."""
    code = "import json, mimkernels.info as i; print(json.dumps(i.collect()['libraries']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return {state["name"]: state for state in json.loads(done.stdout.splitlines()[-1])}[name]


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "mimkernels" / "_lib").iterdir()}


def packaged(package: Path) -> set[str]:
    """The files of a package, without what is built into it."""
    paths = (path.relative_to(package) for path in package.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[0] != "_lib" and "__pycache__" not in path.parts}


def test_the_package_imports_nothing_of_the_checkout():
    for path in (ROOT / "mimkernels").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (benchmarks|tests)\b", path.read_text(), re.M), path


@pytest.mark.slow
def test_a_wheel_holds_what_was_built_and_nothing_stale(tree):
    done = build_wheel(tree, MIMKERNELS_BUILD="require")
    assert done.returncode == 0, done.stdout + done.stderr
    name, folder, build = unpack(tree)
    assert re.fullmatch(r"mimkernels-[\d.]+-py3-none-(?!any).*\.whl", name), "one wheel for every Python"
    assert files(folder) == {"build.json", "libmimkernels_cpu.so", MASKS}
    assert not list(folder.rglob("*stale*"))
    assert (folder / "mimkernels" / "py.typed").exists()
    for room in ("engine", "commands/pretrain", "commands/probe", "commands/demo", "commands/bench"):
        assert list((folder / "mimkernels" / room / "templates").iterdir()), room
    assert {path.name for path in folder.iterdir()} == {"mimkernels", f"{'-'.join(name.split('-')[:2])}.dist-info"}
    assert packaged(folder / "mimkernels") == packaged(ROOT / "mimkernels"), "the package, and no tool of the checkout"
    assert build["torch"] == torch.__version__ and build["compiler"] and "portable" in build["isas"]
    state = library_state(folder)
    assert state["loaded"] and state["instruction_set"] == "stub"
    assert "MIMKERNELS_CUDA=off" in library_state(folder, "cuda")["reason"]
    assert library_state(folder, "masks")["loaded"]
    # Another Python, for which the same wheel is, does not see the module, and says why.
    module = folder / "mimkernels" / "_lib" / MASKS
    module.rename(module.with_name("mimkernels_masks.cpython-399-x86_64-linux-gnu.so"))
    assert "built for another Python" in library_state(folder, "masks")["reason"]
    code = (
        "from mimkernels.data.masks import MaskSampler\n"
        "print(int(MaskSampler((14, 14), 'block_exact', count=75).sample(2, 0).mask.sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "150\n"


@pytest.mark.slow
@pytest.mark.parametrize("emulation", [0, 1])
def test_no_wheel_has_what_stands_in_for_wider_cpus(tmp_path, emulation):
    """setup.py asks for emulation in source trees alone."""
    command = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DMIMKERNELS_CUDA=off"]
    command += [f"-DMIMKERNELS_TORCH_DIR={Path(torch.__file__).parent}", f"-DMIMKERNELS_EMULATION={emulation}"]
    subprocess.run(command, capture_output=True, check=True)
    compiled = set(re.findall(r"MIMKERNELS_ISA=(\w+)", (tmp_path / "build.ninja").read_text()))
    if "avx2" in compiled:
        assert compiled - ISAS >= {"avx2_bf16", "avx2_amx"} if emulation else compiled <= ISAS


@pytest.mark.slow
def test_a_source_distribution_holds_the_checkout(tmp_path):
    """What is needed to build, test, lint and document, so that `make` works there as in a clone."""
    rooms = ("mimkernels", "csrc", "tests", "benchmarks", "docs", "examples")
    tree = tmp_path / "tree"
    for room in rooms:
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("_lib", "__pycache__", ".*"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name not in (".gitignore", ".git", "compile_commands.json"):
            shutil.copy(path, tree)
    there = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert there - held == set()


def test_an_older_setuptools_is_refused_with_the_remedy(tmp_path):
    """Without build isolation nothing reads what pyproject.toml requires."""
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / "setup.py", "--version"], env=env, capture_output=True, text=True)
    oldest = re.search(r"setuptools>=(\d+)", (ROOT / "pyproject.toml").read_text())[1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"setuptools 65.5.0 is older than {oldest}" in done.stderr and "pip install" in done.stderr


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_says_why(tree):
    done = build_wheel(tree, PATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    name, folder, build = unpack(tree)
    assert name.endswith("-py3-none-any.whl") and files(folder) == {"build.json"}
    reason = build["libraries"]["cpu"]["reason"]
    assert re.match(r"no (C\+\+ compiler|cmake|ninja)", reason)
    assert f"no native cpu library: {reason}" in done.stderr
    state = library_state(folder)
    assert not state["loaded"] and reason in state["reason"] and "install" in state["remedy"]


@pytest.mark.slow
def test_a_compiler_too_old_is_the_reason(tree):
    tools = tree.parent / "bin"
    tools.mkdir()
    (tools / "c++").write_text(f'#!/bin/sh\nexec {shutil.which("c++")} -U__GNUC__ -D__GNUC__=7 "$@"\n')
    (tools / "c++").chmod(0o755)
    done = build_wheel(tree, PATH=f"{tools}:{os.environ['PATH']}", CXX="")
    assert done.returncode == 0, done.stdout + done.stderr
    for state in unpack(tree)[2]["libraries"].values():
        words = state["reason"].replace(" | ", " ")
        assert re.search(r"c\+\+ is GNU 7[\d.]+, too old for C\+\+20: install g\+\+ 11 or later", words), words


@pytest.mark.slow
def test_require_fails_where_nothing_can_be_built(tree):
    done = build_wheel(tree, PATH="", MIMKERNELS_BUILD="require")
    assert done.returncode != 0
    assert re.search(r"MIMKERNELS_BUILD=require, but the cpu library was not built: no .* Remedy: ", done.stderr)
    assert not list((tree / "wheels").glob("*.whl"))


@pytest.mark.slow
def test_a_compile_error_is_the_reason(tree):
    for source in (tree / "csrc").rglob("*.cpp"):
        source.write_text('#error "this cannot compile"\n')
    done = build_wheel(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    libraries = unpack(tree)[2]["libraries"]
    assert all("this cannot compile" in libraries[name]["reason"] for name in ("cpu", "masks"))


# Writes down what it is asked, and makes what it is asked for.
CMAKE = """#!{python}
import pathlib, sys
words = sys.argv[1:]
with open("{log}", "a") as log:
    print(*words, file=log)
if words[0] == "-S":
    folder = pathlib.Path(words[words.index("-B") + 1])
    (folder / "lib").mkdir(parents=True, exist_ok=True)
    reasons = '"cuda_reason": "", "emulation_reason": "", "masks_reason": ""'
    (folder / "configured.json").write_text(f'{{{{"nvcc": "13", {{reasons}}}}}}')
else:
    for name in words[words.index("--target") + 1 :]:
        file = "{masks}" if name == "mimkernels_masks" else f"lib{{name}}.so"
        pathlib.Path(words[1], "lib", file).write_text(name)
"""


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "CUDACXX"])
def test_the_toolkit_that_torch_would_take_compiles_the_kernels(tree, variable):
    tools, told = tree.parent / "bin", tree.parent / "told"
    toolkit = tree.parent / "cuda-12.9"
    cmake = f"#!/bin/sh\necho $CUDACXX > {told}\nexit 1\n"
    for path, text in ((tools / "cmake", cmake), (toolkit / "bin" / "nvcc", "")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    given = "/opt/nvcc" if variable == "CUDACXX" else str(toolkit)
    env = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH", "CUDACXX")}
    env |= {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "MIMKERNELS_BUILD": "auto",
        "CUDA_HOME": str(toolkit),
        variable: given,
    }
    if variable == "CUDA_PATH":
        del env["CUDA_HOME"]
    command = [sys.executable, "setup.py", "-q", "build_native", "--inplace", "--runnable"]
    subprocess.run(command, cwd=tree, env=env, capture_output=True, check=True)
    assert told.read_text().strip() == ("/opt/nvcc" if variable == "CUDACXX" else str(toolkit / "bin" / "nvcc"))


@pytest.mark.parametrize("gpu", [False, True])
def test_a_build_of_what_runs_here_is_completed_by_one_of_everything(tree, gpu):
    tools, log = tree.parent / "bin", tree.parent / "log"
    tools.mkdir()
    smi = "#!/bin/sh\n" + ("echo 'GPU 0: NVIDIA H200'" if gpu else "echo 'No devices were found'; exit 6") + "\n"
    for name, text in {"cmake": CMAKE.format(python=sys.executable, log=log, masks=MASKS), "nvidia-smi": smi}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def build(*options: str) -> tuple[str, list[str], dict]:
        log.write_text("")
        env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "MIMKERNELS_BUILD": "require"}
        command = [sys.executable, "setup.py", "-q", "build_native", "--inplace", *options]
        subprocess.run(command, cwd=tree, env=env, capture_output=True, check=True)
        report = json.loads((tree / "mimkernels" / "_lib" / "build.json").read_text())
        configured, compiled = log.read_text().splitlines()
        return configured, compiled.partition(" --target ")[2].split(), report["libraries"]

    def named(libraries: list[str]) -> set[str]:
        return {MASKS if name == "masks" else f"libmimkernels_{name}.so" for name in libraries}

    everything = ["cpu", "cuda", "masks", "cuda_emulated", "emulation_tests"]
    runnable = ["cpu", "cuda", "masks"] if gpu else ["cpu", "masks"]
    configured, targets, libraries = build("--runnable")
    assert targets == [f"mimkernels_{name}" for name in runnable]
    assert files(tree) - {"build.json", "libstale.so"} == named(runnable), "no stale library stays"
    assert [name for name, state in libraries.items() if state["built"]] == runnable
    assert "make build" in libraries["cuda_emulated"]["remedy"]
    again, targets, libraries = build()
    assert again == configured.replace("EMULATION=0", "EMULATION=1"), "in the same folder, where what is compiled stays"
    assert len(targets) == 5 and files(tree) - {"build.json", "libstale.so"} == named(everything)
    assert all(state["built"] for state in libraries.values())
    for name in ("cpu", "cuda"):
        (tree / "mimkernels" / "_lib" / f"libmimkernels_{name}.so").write_text("old")
    _, targets, libraries = build("--only=cuda")
    assert targets == ["mimkernels_cuda"] and all(state["built"] for state in libraries.values())
    texts = [(tree / "mimkernels" / "_lib" / f"libmimkernels_{name}.so").read_text() for name in ("cpu", "cuda")]
    assert texts == ["old", "mimkernels_cuda"], "the others stay"


@pytest.mark.slow
def test_off_builds_nothing(tree):
    done = build_wheel(tree, MIMKERNELS_BUILD="off")
    assert done.returncode == 0, done.stdout + done.stderr
    name, folder, build = unpack(tree)
    assert name.endswith("-py3-none-any.whl") and files(folder) == {"build.json"}
    assert build["libraries"]["cpu"]["reason"] == "switched off with MIMKERNELS_BUILD=off"


def test_nothing_is_written_into_sources_that_cannot_be(tree):
    there = {path for path in tree.rglob("*") if "__pycache__" not in path.parts}
    code = "import os; os.access = lambda *_, **__: 0\nfrom setuptools import build_meta as b\nb.build_wheel('../w')"
    env = {**os.environ, "MIMKERNELS_BUILD": "off"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and list((tree.parent / "w").glob("*.whl")), done.stderr
    assert {path for path in tree.rglob("*") if "__pycache__" not in path.parts} == there


def test_an_unknown_mode_is_refused(tree):
    done = build_wheel(tree, MIMKERNELS_BUILD="yes")
    assert done.returncode != 0 and "'yes'; it can be 'auto', 'require' or 'off'" in done.stderr


def test_an_older_torch_is_not_built_against(tree):
    old = tree.parent / "old" / "torch"
    old.mkdir(parents=True)
    (old / "version.py").write_text("__version__ = '2.9.1'\ncuda = None\n")
    assert build_wheel(tree, MIMKERNELS_TORCH_DIR=str(old)).returncode == 0
    assert "2.9.1" in unpack(tree)[2]["libraries"]["cpu"]["reason"]


def test_torch_is_found_under_build_isolation(tree):
    """Pip hides the environment's packages from the build and offers only the build requirements."""
    overlay = tree.parent / "overlay"
    overlay.mkdir()
    packages = Path(torch.__file__).parents[1]
    import setuptools

    for source in Path(setuptools.__file__).parents[1].glob("setuptools*"):  # with its metadata
        (overlay / source.name).symlink_to(source)
    (overlay / "sitecustomize.py").write_text(
        f"import sys\nsys.path[:] = [path for path in sys.path if path != {str(packages)!r}]\n"
    )
    hidden = subprocess.run(
        [sys.executable, "-c", "import torch"], env={**os.environ, "PYTHONPATH": str(overlay)}, capture_output=True
    )
    assert hidden.returncode != 0, "the stand-in for pip's isolation does not hide torch"
    done = build_wheel(tree, PYTHONPATH=str(overlay), PYTHONNOUSERSITE="1", PATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert unpack(tree)[2]["torch"] == torch.__version__
