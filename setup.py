"""Drives CMake, copies the native libraries into the package, and writes down why where there are none.

``MIMKERNELS_BUILD``       auto (default): build what can be built, never break the installation; require:
                           fail where the CPU library, or what needs more and has it (nvcc for the CUDA library,
                           pybind11 for the mask samplers), cannot be built; off: the Python part alone.
``MIMKERNELS_BUILD_DIR``   keep CMake's build folder there and build incrementally. Editable installations
                           keep one in build/native; all others build in a temporary folder.
``MIMKERNELS_TORCH_DIR``   folder of the torch package to build against; by default it is searched for.
``MIMKERNELS_CMAKE_ARGS``  further arguments of CMake, such as -DMIMKERNELS_CUDA=off.
``MAX_JOBS``               compile jobs at a time.
``CUDACXX``, ``CUDA_HOME`` nvcc, or the folder of the CUDA toolkit, where it is not the one on PATH.

The module of mask samplers (csrc/masks) is for the Python that runs the build, by its name; another Python does not
see it and draws the same masks without it, so that one wheel still serves every version.

In a source tree (editable, or build_native --inplace) the CUDA kernels are also compiled for the host, for tests
(csrc/emulation). No wheel has them. ``build_native --inplace --runnable`` leaves out what this machine does not need to
run mimkernels: the CUDA library where there is no GPU, and what is for tests. A later build without it adds them to the
same folder and keeps what is compiled.

Sources and compiler options are in CMakeLists.txt, metadata in pyproject.toml.
"""

import atexit
import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools

OLDEST_SETUPTOOLS = 77  # as in pyproject.toml, which nothing reads without build isolation
if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"mimkernels: setuptools {setuptools.__version__} is older than {OLDEST_SETUPTOOLS}. Remedy: pip install "
        f"without --no-build-isolation, or first pip install -U 'setuptools>={OLDEST_SETUPTOOLS}' cmake ninja pybind11"
    )

from setuptools import Command, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build import build  # noqa: E402
from setuptools.command.egg_info import egg_info  # noqa: E402

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
EMULATED = ("cuda_emulated", "emulation_tests")
REINSTALL = "pip install . again, in the clone"


def file_name(name: str) -> str:
    """Name of a library's file; that of the Python module says which Python it is for."""
    return (
        f"mimkernels_masks{sysconfig.get_config_var('EXT_SUFFIX')}" if name == "masks" else f"libmimkernels_{name}.so"
    )


class NotBuilt(Exception):
    """Why a library cannot be built, and what to do about it."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.reason, self.remedy = reason, f"{remedy}, then {REINSTALL}"


def temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="mimkernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def find_torch() -> tuple[Path, str, str | None]:
    """Folder, version and CUDA version of the torch in the environment that is being installed into.

    Under build isolation torch cannot be imported here: pip hides the environment's packages with variables
    that a fresh interpreter without them does not know, so such an interpreter is asked.
    """
    folder = os.environ.get("MIMKERNELS_TORCH_DIR")
    searched = ["MIMKERNELS_TORCH_DIR"]
    if not folder:
        hiding = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")
        variables = {key: value for key, value in os.environ.items() if key not in hiding}
        question = "import importlib.util as u; s = u.find_spec('torch'); print(s and s.origin or '')"
        pythons = [(sys.executable, os.environ), (sys.executable, variables)]
        for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
            if os.environ.get(name):
                pythons.append((os.path.join(os.environ[name], "bin", "python"), variables))
        searched = sorted({python for python, _ in pythons})
        for python, env in pythons:
            if not os.path.exists(python):
                continue
            asked = subprocess.run([python, "-c", question], env=env, cwd=tempfile.gettempdir(),
                                   capture_output=True, text=True)  # fmt: skip
            if asked.returncode == 0 and asked.stdout.strip():
                folder = str(Path(asked.stdout.strip()).parent)
                break
    if not folder:
        raise NotBuilt(f"no torch was found by {', '.join(searched)}", "install torch >= 2.10")
    version_file = Path(folder, "version.py")
    if not version_file.exists():
        raise NotBuilt(f"{folder} is no torch package: it has no version.py", "set MIMKERNELS_TORCH_DIR")
    facts = runpy.run_path(str(version_file))
    version = str(facts["__version__"])
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise NotBuilt(f"torch {version} in {folder} is older than 2.10", "install torch >= 2.10")
    return Path(folder), version, facts.get("cuda")


def find_tool(name: str) -> str:
    """Path of cmake or ninja: on PATH, where build isolation puts pip's, else beside the interpreter."""
    beside = Path(sys.executable).parent / name
    found = shutil.which(name) or (str(beside) if beside.exists() else None)
    if not found:
        raise NotBuilt(f"no {name} was found", f"pip install {name}")
    return found


def find_nvcc() -> str | None:
    """Path of nvcc as torch's extensions find it, CUDA_HOME before PATH before /usr/local/cuda; None where CMake, which
    knows CUDACXX and PATH alone, finds the same."""
    if os.environ.get("CUDACXX"):
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if not homes and not shutil.which("nvcc"):
        homes = ["/usr/local/cuda"]
    return next((str(nvcc) for home in homes if (nvcc := Path(home, "bin", "nvcc")).exists()), None)


def has_gpu() -> bool:
    """Whether nvidia-smi, which comes with the driver, lists a GPU."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def run(command: list[str], what: str, remedy: str) -> None:
    print("mimkernels:", shlex.join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        # Ninja repeats whole command lines, which say nothing about what went wrong.
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if 0 < len(line) < 400]
        telling = re.compile(r"\berror\b|undefined reference|No such file", re.IGNORECASE)
        first = next((i for i, line in enumerate(lines) if telling.search(line)), max(len(lines) - 4, 0))
        raise NotBuilt(f"{what} failed: " + " | ".join(lines[first : first + 4]), remedy)


def compile_libraries(folder: Path, report: dict, names: list[str]) -> dict[str, Path]:
    """Compiles the named libraries into ``folder``, fills ``report``, returns those that were made."""
    torch_dir, torch_version, torch_cuda = find_torch()
    report["torch"], report["torch_cuda"] = torch_version, torch_cuda
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    if nvcc := find_nvcc():
        os.environ["CUDACXX"] = nvcc
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not compiler:
        raise NotBuilt("no C++ compiler (c++, g++, clang++) was found", "install g++ 11 or later")
    run(
        [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
         f"-DMIMKERNELS_TORCH_DIR={torch_dir}", f"-DMIMKERNELS_EMULATION={int(EMULATED[0] in names)}",
         f"-DMIMKERNELS_PYTHON={sys.executable}",
         # Not those that an earlier build in this folder was given.
         "-DMIMKERNELS_CUDA_ARCHITECTURES=", f"-DCMAKE_CUDA_FLAGS={os.environ.get('CUDAFLAGS', '')}",
         *shlex.split(os.environ.get("MIMKERNELS_CMAKE_ARGS", ""))],
        "CMake's configuration", "mend what it names",
    )  # fmt: skip
    configured = json.loads((folder / "configured.json").read_text())
    report.update(configured)
    made = {}
    emulation = (configured["emulation_reason"], "use g++ on Linux")
    cannot = {
        "cuda": (configured["cuda_reason"], "install the CUDA toolkit (nvcc) 12.8 or later"),
        "masks": (configured["masks_reason"], "pip install pybind11, install the headers of Python (python3-dev)"),
        **dict.fromkeys(EMULATED, emulation),
    }
    build = [cmake, "--build", str(folder), "--parallel", os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)]

    def compiled(*libraries: str) -> None:
        targets = [f"mimkernels_{name}" for name in libraries]
        remedy = f"mend what it names (compiled by {configured.get('compiler')}; CXX names another compiler)"
        run([*build, "--target", *targets], f"compiling the {' '.join(libraries)} library", remedy)
        made.update((name, folder / "lib" / file_name(name)) for name in libraries)

    with contextlib.suppress(NotBuilt):  # together, so that no core waits for the last file of one library
        compiled(*(name for name in names if not cannot.get(name, ("",))[0]))
    for name in (name for name in names if name not in made):
        try:
            if name in cannot and cannot[name][0]:
                raise NotBuilt(*cannot[name])
            compiled(name)
        except NotBuilt as error:
            report["libraries"][name] = {"built": False, "reason": error.reason, "remedy": error.remedy}
    return made


class BuildNative(Command):
    """Puts the libraries and build.json into mimkernels/_lib.

    Of the source tree when the installation is editable, or for ``python setup.py build_native --inplace``,
    the quick way to rebuild after a change in csrc.
    """

    description = "build the native libraries"
    user_options = [
        ("inplace", "i", "put the libraries into the source tree"),
        ("runnable", None, "only what this machine runs: the CPU libraries, and the CUDA library where there is a GPU"),
        ("only=", None, "this library alone, such as cuda; what is here of the others stays"),
    ]
    boolean_options = ["inplace", "runnable"]
    editable_mode = False  # set by setuptools

    def initialize_options(self):
        self.inplace = self.runnable = False
        self.build_lib = self.only = None
        self.made = {}

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        mode = os.environ.get("MIMKERNELS_BUILD", "auto")
        if mode not in ("auto", "require", "off"):
            raise ValueError(f"MIMKERNELS_BUILD is {mode!r}; it can be 'auto', 'require' or 'off'")
        inplace = self.editable_mode or self.inplace
        target = (ROOT if inplace else Path(self.build_lib)) / "mimkernels" / "_lib"
        target.mkdir(parents=True, exist_ok=True)
        names = ["cpu", "cuda", "masks", *(EMULATED if inplace else [])]
        runnable = ("cpu", "cuda", "masks") if has_gpu() else ("cpu", "masks")
        wanted = [name for name in names if name in runnable] if self.runnable else names
        left_out = {"built": False, "reason": "only what this machine runs was built", "remedy": "make build"}
        report = {"mode": mode, "libraries": {name: left_out for name in names if name not in wanted}}
        if self.only:
            if self.only not in names:
                raise ValueError(f"--only={self.only} is none of {', '.join(names)}")
            with contextlib.suppress(OSError, ValueError, KeyError):
                report["libraries"] = json.loads((target / "build.json").read_text())["libraries"]
            names = wanted = [self.only]
        keep = os.environ.get("MIMKERNELS_BUILD_DIR") or (inplace and ROOT / "build" / "native")
        folder = Path(keep or temporary_folder()).resolve()
        try:
            if mode == "off":
                raise NotBuilt("switched off with MIMKERNELS_BUILD=off", "unset MIMKERNELS_BUILD")
            self.made = compile_libraries(folder, report, wanted)
        except NotBuilt as error:
            missing = {"built": False, "reason": error.reason, "remedy": error.remedy}
            report["libraries"].update(dict.fromkeys(names, missing))
        for name in names:
            # Never overwritten in place: a running process may have it mapped. Modules of other Pythons go, too: they
            # are of other sources.
            for file in target.glob("mimkernels_masks.*.so" if name == "masks" else file_name(name)):
                file.unlink()
            if name in self.made:
                shutil.copy2(self.made[name], target / file_name(name))
                report["libraries"][name] = {"built": True}
            elif name in wanted:
                reason = report["libraries"][name]["reason"]
                print(f"mimkernels: no native {name} library: {reason}", file=sys.stderr)
        (target / "build.json").write_text(json.dumps(report, indent=2) + "\n")
        if mode == "require":
            can_be = {
                "cuda": report.get("nvcc") and not report.get("cuda_reason"),
                "masks": not report.get("masks_reason"),
            }
            for name in wanted:
                if name not in self.made and can_be.get(name, True):
                    facts = report["libraries"][name]
                    raise RuntimeError(
                        f"MIMKERNELS_BUILD=require, but the {name} library was not built: {facts['reason']}. "
                        f"Remedy: {facts['remedy']}"
                    )

    def get_source_files(self):
        return []

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class Build(build):
    """Builds in a folder of its own, so that nothing of an earlier build reaches a wheel."""

    sub_commands = [*build.sub_commands, ("build_native", None)]

    def finalize_options(self):
        if self.build_base == "build":
            self.build_base = temporary_folder()
        super().finalize_options()


class EggInfo(egg_info):
    """Sources that cannot be written are installed from, too: their metadata is made elsewhere."""

    def initialize_options(self):
        super().initialize_options()
        if not os.access(ROOT, os.W_OK):
            self.egg_base = temporary_folder()


class Wheel(bdist_wheel):
    """The libraries know nothing of Python: one wheel serves every version of it. The mask samplers' module, which
    does, is only seen by the version that it was built by."""

    def run(self):
        self.run_command("build_native")
        native = bool(self.get_finalized_command("build_native").made)
        self.root_is_pure = not native
        self.distribution.has_ext_modules = lambda: native  # decides where in the wheel the package goes
        super().run()

    def get_tag(self):
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


setup(cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel, "egg_info": EggInfo})
