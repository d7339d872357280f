"""Compares the benchmarks of two git revisions: ``python -m benchmarks compare-revisions v0.1 HEAD --only gather``.

Each revision is built in a worktree of its own; their benchmarks run in turns. Exit status 1 if a case is slower beyond
the noise, as ``mimkernels.commands.bench.compare`` measures it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mimkernels.commands.bench.compare import Change, compare, read, show, slower

GROUPS = ("gathering", "pooling", "mlp", "norm", "attention")
_REPEATS = 5  # runs of each revision
_NATIVE = ("csrc", "CMakeLists.txt", "setup.py")  # what the libraries are made of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a git revision")
    parser.add_argument("after", help="a git revision")
    parser.add_argument("--repeat", type=int, default=_REPEATS, help=f"runs of each revision (default {_REPEATS})")
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time per case (default 2)")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--group", nargs="+", default=list(GROUPS), help=f"default: {' '.join(GROUPS)}")
    options = parser.parse_args()
    try:
        changes = compare_revisions(options)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"{parser.prog}: {error}\n{getattr(error, 'stderr', None) or ''}".rstrip(), file=sys.stderr)
        return 2
    show(changes)
    return int(slower(changes))


def compare_revisions(options: argparse.Namespace) -> list[Change]:
    """The changes from one revision to the other, from ``options.repeat`` runs of each.

    Raises:
        ValueError: a revision does not exist, or the two have no case in common.
        subprocess.CalledProcessError: building or measuring one of them failed.
    """
    revisions = [_commit(options.before), _commit(options.after)]
    root = Path(_git("rev-parse", "--show-toplevel"))
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder) / name for name in ("before", "after")]
        try:
            for tree, revision in zip(trees, revisions, strict=True):
                _git("worktree", "add", "--detach", str(tree), revision)
                _build(tree, root)
            results: list[list[Path]] = [[], []]
            for number in range(options.repeat):
                for side, tree in enumerate(trees):
                    print(f"run {number + 1} of {options.repeat}, {('before', 'after')[side]}", flush=True)
                    results[side].append(_measure(tree, Path(folder) / f"{side}-{number}", options))
            return compare(*(read(*side) for side in results))
        finally:
            for tree in trees:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], capture_output=True)


def _build(tree: Path, root: Path) -> None:
    """Give the tree its libraries: those of this checkout where its sources are the same, else compiled."""
    here = root / "mimkernels" / "_lib"
    revision = _git("rev-parse", "HEAD", cwd=tree)
    differ = subprocess.run(["git", "diff", "--quiet", revision, "--", *_NATIVE], cwd=root).returncode
    if not differ and any(here.glob("*.so")):
        shutil.copytree(here, tree / "mimkernels" / "_lib", dirs_exist_ok=True)
        return
    print(f"compiling {tree.name}", flush=True)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_native", "--inplace"],
        cwd=tree, env={**os.environ, "MIMKERNELS_BUILD": "require"}, check=True, capture_output=True, text=True,
    )  # fmt: skip


def _measure(tree: Path, output: Path, options: argparse.Namespace) -> Path:
    """Run the tree's own benchmarks into ``output``."""
    command = [sys.executable, "-m", "mimkernels", "bench", "run", "--no-compile", "--output", str(output)]
    command += ["--seconds", str(options.seconds), "--group", *options.group]
    command += ["--only", options.only] if options.only else []
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    return output


def _commit(revision: str) -> str:
    try:
        return _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise ValueError(f"{revision!r} is no git revision here") from error


def _git(*arguments: str, cwd: Path | None = None) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()
