"""From the lines of a run to what follows from them, in Markdown."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.gpu_stages.estimates import ESTIMATES, STEP_TOLERANCE, STEPS, TOLERANCE

_SDPA = ("flash", "cudnn", "efficient", "math")
_CLEAR = 0.05  # a difference in time that decides which backend comes first


def report(lines: Sequence[dict]) -> str:
    """All that the lines say; parts without lines are left out."""
    by_stage: dict[str, list[dict]] = {}
    for line in lines:
        by_stage.setdefault(line["stage"], []).append(line)
    parts = [
        _machine(by_stage.get("floors", [])),
        _stages(by_stage.get("run", [])),
        _contract(by_stage.get("contract", [])),
        _attention(by_stage.get("attention", [])),
        _memory(by_stage.get("memory", [])),
        _triton(by_stage.get("triton", [])),
        _steps(by_stage.get("step", [])),
        _tools(by_stage),
        _estimates(lines),
        _errors(lines),
    ]
    return "\n\n".join(part for part in parts if part)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in lines)


def _machine(lines: Sequence[dict]) -> str:
    found = {line["case"]: line for line in lines}
    device, copy, gemm = (found.get(name, {}) for name in ("device", "copy", "gemm"))
    words = [f"# {device.get('name', 'No device: a rehearsal with the emulated kernels')}"]
    if "tb_per_s" in copy:
        words.append(f"A copy moves {copy['tb_per_s']:.3g} TB/s (read and written together).")
    if "tflops" in gemm:
        words.append(f"A product of {gemm['size']} x {gemm['size']} matrices runs at {gemm['tflops']:.3g} TFLOP/s.")
    return "\n".join(words)


def _stages(lines: Sequence[dict]) -> str:
    rows = [(line["case"], line["state"], f"{line['s']:.0f}", line.get("limit")) for line in lines]
    return "## Stages\n" + _table(("stage", "", "s", "at most"), rows) if rows else ""


def _contract(lines: Sequence[dict]) -> str:
    if not lines:
        return ""
    last = {line["case"]: line for line in lines}
    states: dict[str, Counter] = {}
    for line in last.values():
        states.setdefault(line["op"], Counter())[line["state"]] += 1
    rows = [(op, *(counts[state] for state in ("right", "wrong", "failed", "begun"))) for op, counts in states.items()]
    words = ["## Contract", _table(("op", "right", "wrong", "failed", "begun and never ended"), rows)]
    bad = [line for line in last.values() if line["state"] != "right"]
    words += [f"- {line['case']}: {line['state']}. {line.get('error', '')}" for line in bad]
    return "\n".join(words)


def _by_case(lines: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """Timings by case and version."""
    found: dict[str, dict[str, dict]] = {}
    for line in lines:
        if "us" in line:
            found.setdefault(line["case"], {})[line["version"]] = line
    return found


def _attention(lines: Sequence[dict]) -> str:
    cases = _by_case(lines)
    if not cases:
        return ""
    names = list(dict.fromkeys(name for versions in cases.values() for name in versions))
    rows = []
    for case, versions in cases.items():
        theirs = {name: versions[name]["us"] for name in _SDPA if name in versions}
        fastest = min(theirs, key=theirs.__getitem__, default=None)
        shares = [
            f"{name} {versions[name]['us'] / theirs[fastest]:.2f}" for name in versions if name not in _SDPA and fastest
        ]
        rows.append((case, *(_us(versions.get(name)) for name in names), fastest, ", ".join(shares)))
    head = ("us", *names, "fastest SDPA", "time of ours over it")
    return "## Attention, CUDA C++\n" + _table(head, rows)


def _us(line: dict | None) -> str | None:
    if line is None:
        return None
    return f"{line['us']:.1f}" + (" (launches included)" if line.get("graph") is False else "")


def _memory(lines: Sequence[dict]) -> str:
    cases = _by_case(lines)
    rows = []
    for case, versions in cases.items():
        ours, plain = versions.get("ours"), versions.get("plain")
        if ours is None:
            continue
        share = ours.get("share_of_copy")
        ratio = f"{plain['us'] / ours['us']:.2f}" if plain else None
        rows.append((case, _us(ours), None if share is None else f"{share:.1%}", ratio))
    return "## Memory\n" + _table(("", "us", "of a copy", "times as fast as plain"), rows) if rows else ""


def _triton(lines: Sequence[dict]) -> str:
    cases = _by_case(lines)
    compiled = {line["case"].removesuffix(": compile"): line["compile_s"] for line in lines if "compile_s" in line}
    rows, ratios = [], {}
    for case, versions in cases.items():
        for extra in ("", ", bare"):
            ours = versions.get(f"triton{extra}")
            other = next(
                (versions[name] for name in versions if name in (f"cuda{extra}", f"cuda-emulated{extra}")), None
            )
            if ours is None or other is None:
                continue
            ratio = ours["us"] / other["us"]
            ratios.setdefault(ours["kind"] + extra, []).append((case, ratio))
            seconds = compiled.get(case) if not extra else None
            rows.append((case + extra, _us(ours), _us(other), f"{ratio:.2f}", _first(ratio), seconds))
    words = []
    if rows:
        head = ("", "triton us", "cuda us", "triton / cuda", "first", "compiled in s")
        words += ["## Triton against CUDA C++", _table(head, rows), "", "Proposed order in the specs:"]
    for kind, found in ratios.items():
        mean = math.exp(statistics.fmean(math.log(ratio) for _, ratio in found))
        verdicts = {_first(ratio) for _, ratio in found} - {"either"}
        if len(verdicts) > 1:
            split = "; ".join(f"{_first(ratio)} for {case}" for case, ratio in found)
            words.append(f"- {kind}: by shape: {split}")
        else:
            words.append(f"- {kind}: {_first(mean)} (triton takes {mean:.2f} of cuda's time)")
    blocks = [line for line in lines if "blocks" in line]
    for entry, tried in itertools.groupby(blocks, key=lambda line: line["entry"]):
        best = min(tried, key=lambda line: line["best_us"])
        known = ", as committed" if best["committed"] else ""
        words.append(f"- block sizes of {entry}: {best['blocks']} ({best['best_us']:.1f} us{known})")
    return "\n".join(words)


def _first(ratio: float) -> str:
    """Which backend comes first where Triton takes `ratio` of the time of CUDA C++."""
    if abs(ratio - 1) <= _CLEAR:
        return "either"
    return "triton" if ratio < 1 else "cuda"


def _steps(lines: Sequence[dict]) -> str:
    rows = [
        (
            line["case"],
            line["version"],
            f"{line['ms']:.2f}",
            f"{line['images'] / line['ms'] * 1e3:.3g}",
            line["peak_mib"],
        )
        for line in lines
        if "ms" in line
    ]
    words = ["## Step", _table(("", "version", "ms", "images/s", "peak MiB"), rows)] if rows else []
    for line in lines:
        if "kinds_ms" in line:
            spent = ", ".join(
                f"{kind} {ms:.2f}" for kind, ms in sorted(line["kinds_ms"].items(), key=lambda kv: -kv[1])
            )
            words.append(f"- {line['case']}, ms: {spent}")
        if "same_bits" in line:
            bits = "the same bits" if line["same_bits"] else f"other bits, by up to {line['largest_difference']:.2g}"
            words.append(f"- {line['case']}: losses of replays and of eager steps have {bits}")
    return "\n".join(words)


def _tools(by_stage: dict[str, list[dict]]) -> str:
    words = []
    for line in by_stage.get("tools", []):
        words.append(f"- {line['case']}: {line.get('missing') or 'status {}'.format(line['status'])}")
    words += [f"- {line['case']}: {line['summary']}" for line in by_stage.get("sanitizer", [])]
    for line in by_stage.get("ncu", []):
        metrics = {name: value for name, value in line.items() if name not in ("stage", "case", "at")}
        words.append(f"- {line['case']}: " + ", ".join(f"{name} {value}" for name, value in metrics.items()))
    return "\n".join(["## Tools", *words]) if words else ""


def _estimates(lines: Sequence[dict]) -> str:
    rows = []
    for expected in ESTIMATES:
        for line in lines:
            if line["stage"] != expected.stage or line.get("version") != expected.version or "us" not in line:
                continue
            shape = re.search(r"B=256 H=12 N=(\d+) D=64", line["case"])
            if line.get("kind") != expected.kind or shape is None or int(shape[1]) != expected.tokens:
                continue
            what = f"{expected.kind}, N = {expected.tokens}, {expected.version}"
            low, high = expected.low * (1 - TOLERANCE), expected.high * (1 + TOLERANCE)
            said = f"{expected.low:g} to {expected.high:g} us"
            rows.append((what, said, f"{line['us']:.1f} us", _verdict(line["us"], low, high)))
    for line in lines:
        if line["stage"] == "step" and "ms" in line and "vit_base" in line["case"] and line["images"] == 256:
            said = STEPS.get(line["version"])
            if said is not None:
                verdict = _verdict(line["ms"], said * (1 - STEP_TOLERANCE), said * (1 + STEP_TOLERANCE))
                rows.append((f"step, {line['version']}", f"{said:g} ms", f"{line['ms']:.1f} ms", verdict))
    return "## Estimates\n" + _table(("", "estimated", "measured", ""), rows) if rows else ""


def _verdict(value: float, low: float, high: float) -> str:
    if low <= value <= high:
        return "as estimated"
    return "refuted: faster" if value < low else "refuted: slower"


def _errors(lines: Sequence[dict]) -> str:
    bad = [line for line in lines if "error" in line and line["stage"] != "contract"]
    bad += [line for line in lines if "missing" in line and line["stage"] == "attention"]
    words = [
        f"- {line['stage']}, {line['case']}: {line.get('error') or '{version}: {missing}'.format_map(line)}"
        for line in bad
    ]
    return "\n".join(["## What did not run", *words]) if words else ""
