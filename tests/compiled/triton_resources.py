"""What every Triton kernel takes of a GPU, compiled ahead of time for GPUs that need not be there.

``python -m tests.compiled.triton_resources`` writes triton_resources.json beside this file. With each kernel the table
has a digest of all that the compiler is given, the sources that the kernel reaches included. So only what differs is
compiled again, by this command and by the tests, which refuse a table that differs from what they find. Some are
compiled every time. With another Triton than the table's, all are.

Compiling happens in processes of their own, because the interpreter in which other tests run Triton replaces its
compiler process-wide.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITCallable

from tests.compiled import attention_aot, ops_aot

HERE = Path(__file__).parent
TABLE = HERE / "triton_resources.json"
RENEW = "python -m tests.compiled.triton_resources writes the table anew"
# One kernel per generation, forward and backward, of attention and of another op: compiled by every test run.
ALWAYS = (
    *("forward-90-half-64-None-True", "dkv-80-fp32-64-None-True", "coef-100-half-64-None-True"),
    *("gather_tokens-plain-80", "add_layer_norm-plain-90", "patchify_gather-bwd-100"),
)
Rows = list[dict]


def names() -> dict[str, tuple]:
    """What is compiled, by its name in the table: (function of its launches, arguments)."""
    attention = {attention_name(entry): (attention_aot.launches, entry) for entry in attention_aot.entries()}
    ops = {f"{case}-{arch}": (ops_aot.launches, case, arch) for case in ops_aot.CASES for arch in ops_aot.ARCHITECTURES}
    return attention | ops


def attention_name(entry: tuple) -> str:
    return "-".join(str(part) for part in entry)


def table() -> dict[str, Rows]:
    """The committed rows, by name; none if they are of another Triton."""
    written = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": None}
    return written["kernels"] if written["triton"] == triton.__version__ else {}


def read(always: tuple[str, ...] = ALWAYS) -> dict[str, Rows | str]:
    """The rows of everything, by name; a string where a kernel does not compile."""
    known = {name: rows for name, rows in table().items() if name not in always}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    jobs = [json.dumps([name, known.get(name, [])]) + "\n" for name in names()]
    workers = min(4, os.cpu_count() or 1)
    running = []
    for first in range(workers):
        with tempfile.TemporaryFile("w+") as given:
            given.write("".join(jobs[first::workers]))
            given.seek(0)
            command = [sys.executable, "-m", "tests.compiled.triton_resources", "--rows"]
            running.append(subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, env=environment, text=True))
    found = {}
    for process in running:
        made, _ = process.communicate()
        assert process.returncode == 0, "the process that compiles kernels failed; its error is above"
        found.update(json.loads(line) for line in made.splitlines())
    return {name: found[name] for name in names()}


def rows(known: Rows, launches: list[tuple]) -> Rows:
    """The row of each launch: the known one if it is of what would be compiled now."""
    made = []
    for place, launch in enumerate(launches):
        of = digest(*launch)
        before = known[place] if place < len(known) else {}
        made.append(before if before.get("digest") == of else {**resources(*launch), "digest": of})
    return made


def digest(source: ASTSource, arch: int, options: dict) -> str:
    """Of all that decides what is compiled, but Triton's version."""
    text = f"{source.hash()} {source.name} {arch} {sorted(options.items())}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resources(source: ASTSource, arch: int, options: dict) -> dict:
    """Registers, bytes of stack (spills) and of local memory per thread, shared bytes, and facts of the PTX."""
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    assert cubin, f"{source.name}: nothing was compiled"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": source.name,
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "shared": compiled.metadata.shared,
        "wide": bool(re.search(r"(ld|st)\.global\S*\.v4\.[bfu]32|cp\.async\.cg\.[^;]*, 0x10,", ptx)),
        "atomics": bool(re.search(r"\b(atom|red)\.", ptx)),
    }


def forget_lines() -> None:
    """Kernels that only moved within their files are the same; Triton takes a function's line for a part of it."""
    for name, module in sys.modules.items():
        if name.startswith("mimkernels."):
            for value in vars(module).values():
                if isinstance(value, JITCallable) and value.starting_line_number:
                    value.starting_line_number, value.hash = 0, None


def write_rows() -> None:
    """A line of JSON for each line of standard input, which names a job and the rows that are known of it."""
    jobs = names()
    for line in sys.stdin:
        name, known = json.loads(line)
        of, *arguments = jobs[name]
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            launches = of(*arguments)
            forget_lines()
            made: Rows | str = rows(known, launches)
        except Exception as error:
            made = f"{type(error).__name__}: {error}"
        print(json.dumps([name, made]), flush=True)


def write_table() -> None:
    found = read()
    assert not (failed := {name: made for name, made in found.items() if isinstance(made, str)}), failed
    lines = []
    for name, made in found.items():
        lines.append(f"  {json.dumps(name)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in made) + "\n  ]")
    head = f' "triton": {json.dumps(triton.__version__)},\n'
    TABLE.write_text("{\n" + head + ' "kernels": {\n' + ",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    write_rows() if "--rows" in sys.argv else write_table()
