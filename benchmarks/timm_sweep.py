"""Compares timm's families with and without ``accelerate``.

Outputs, gradients, captured statistics and times of one model or more of each family; writes docs/TIMM.md.
``python -m benchmarks timm-sweep`` takes some minutes on one core; with ``--only swin_transformer beit`` it
renews the rows of those families, with ``--seconds 0`` all but the times, where the versions and the CPU are those of
what is on file.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import math
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import timm
import torch
from timm import layers
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mimkernels.heads import capture
from mimkernels.integrations._reroute import calls_sdpa
from mimkernels.integrations.timm import accelerate
from mimkernels.nn.relative import RELATIVE

ROOT = Path(__file__).resolve().parent.parent
JSON, TABLE = ROOT / "benchmarks" / "results" / "timm.json", ROOT / "docs" / "TIMM.md"


@dataclass(frozen=True)
class Variant:
    """A model of a family: what is compared at `size` pixels, and timed at `timed`."""

    model: str
    size: int = 64
    timed: int = 224
    kwargs: dict = field(default_factory=dict)

    def build(self, size: int) -> nn.Module:
        try:
            return timm.create_model(self.model, num_classes=8, img_size=size, **self.kwargs)
        except TypeError:  # convolutional families take any image
            return timm.create_model(self.model, num_classes=8, **self.kwargs)

    def inputs(self, size: int) -> Tensor:
        return torch.rand(2, 3, size, size)


@dataclass(frozen=True)
class LayerVariant:
    """A layer of ``timm.layers`` that calls SDPA and that few models have."""

    model: str
    shape: tuple[int, ...]
    kwargs: dict = field(default_factory=dict)
    size: int = 0
    timed: int = 0

    def build(self, size: int) -> nn.Module:
        return nn.Sequential(getattr(layers, self.model)(**self.kwargs))

    def inputs(self, size: int) -> Tensor:
        return torch.rand(self.shape)


def _two(model: str, size: int = 64, timed: int = 224, **kwargs: object) -> Variant:
    """Two blocks: more of the same add time, not knowledge."""
    return Variant(model, size, timed, {"depth": 2, **kwargs})


def _short(model: str, *depths: int, timed: int = 224) -> Variant:
    return Variant(model, 64, timed, {"depths": depths})


# By module of timm.models: together they have every class that calls SDPA, and those that are written anew without it.
FAMILIES: dict[str, tuple[Variant | LayerVariant, ...]] = {
    "beit": (_two("beit_base_patch16_224"), _two("beitv2_base_patch16_224", use_shared_rel_pos_bias=True)),
    "byobnet": (Variant("resnet50_clip"),),
    "cait": (_two("cait_xxs24_224"),),
    "cpubone": (Variant("cpubone_nano"),),
    "crossvit": (Variant("crossvit_9_240", 240, 240),),
    "csatv2": (Variant("csatv2", 128, 256),),
    "davit": (_short("davit_tiny", 1, 1, 1, 1),),
    "deepseek_vit": (_two("deepseek_vit_412m", 546, 546),),
    "deit": (_two("deit_tiny_distilled_patch16_224"), _two("deit3_small_patch16_224")),
    "eva": (
        _two("eva02_tiny_patch14_224", 56),
        _two("vit_small_patch16_rope_224"),
        _two("vit_small_patch16_rope_mixed_ape_224"),
        _two("vit_pe_core_tiny_patch16_384"),
        _two("vit_small_patch16_dinov3"),
    ),
    "fastvit": (Variant("fastvit_sa12", timed=256),),
    "gemma4_vit": (_two("gemma4_vit_167m", timed=256),),
    "hiera": (Variant("hiera_tiny_224", 224, 224, {"stages": (1, 1, 1, 1)}),),
    "hieradet_sam2": (Variant("sam2_hiera_tiny", timed=256, kwargs={"stages": (1, 1, 1, 1)}),),
    "iformer": (Variant("iformer_t"),),
    "lowformer": (Variant("lowformer_b0"),),
    "maxxvit": (
        Variant("coatnet_nano_rw_224"),
        Variant("coatnet_rmlp_nano_rw_224"),
        Variant("maxvit_pico_rw_256", timed=256),
        Variant("maxxvitv2_nano_rw_256", timed=256),
    ),
    "metaformer": (Variant("caformer_s18"),),
    "mobilenetv3": (Variant("mobilenetv4_hybrid_medium", timed=256),),
    "mobilenetv5": (Variant("mobilenetv5_base", timed=256),),
    "mobilevit": (Variant("mobilevit_xxs", timed=256),),
    "naflexvit": (
        _two("naflexvit_base_patch16_map", timed=256),
        _two("naflexvit_base_patch16_gap", timed=256, rope_type="axial"),
    ),
    "nest": (Variant("nest_tiny"),),
    "nextvit": (Variant("nextvit_small"),),
    "pit": (Variant("pit_ti_224"),),
    "pvt_v2": (Variant("pvt_v2_b0"),),
    "qwen3_vit": (_two("qwen3_vit_88m", timed=256),),
    "swin_transformer": (_short("swin_tiny_patch4_window7_224", 2, 2, 2, 2),),
    "swin_transformer_v2": (_short("swinv2_tiny_window8_256", 2, 2, 2, 2, timed=256),),
    "tiny_vit": (Variant("tiny_vit_5m_224"),),
    "twins": (_short("twins_svt_small", 2, 2, 2, 2), _short("twins_pcpvt_small", 1, 1, 1, 1)),
    "visformer": (Variant("visformer_tiny"),),
    "vision_transformer": (
        _two("vit_tiny_patch16_224"),
        _two("vit_base_patch16_224"),
        _two("vit_small_patch14_reg4_dinov2", 56),
        _two("vit_base_patch16_siglip_224"),
        _two("vit_wee_patch16_reg1_gap_256", timed=256, global_pool="prr"),
        _two("vit_dwee_patch16_reg1_gap_256", timed=256),
        _two("vit_pwee_patch16_reg1_gap_256", timed=256),
        _two("vit_dpwee_patch16_reg1_gap_256", timed=256),
    ),
    "vision_transformer_hybrid": (_two("vit_tiny_r_s16_p8_224"),),
    "vision_transformer_relpos": (
        _two("vit_relpos_small_patch16_224"),
        _two("vit_relpos_small_patch16_rpn_224"),
        _two("vit_srelpos_small_patch16_224"),
    ),
    "vision_transformer_sam": (_two("samvit_base_patch16_224"),),
    "vitamin": (Variant("vitamin_small_224"),),
    "volo": (Variant("volo_d1_224"),),
    "xcit": (_two("xcit_nano_12_p16_224"),),
    "timm.layers": (
        LayerVariant("SimPool1d", (8, 196, 192), {"dim": 192}),
        LayerVariant("SimPool2d", (8, 192, 14, 14), {"dim": 192}),
        LayerVariant("RotAttentionPool2d", (8, 192, 7, 7), {"in_features": 192, "num_heads": 3}),
        LayerVariant("Attention2d", (8, 192, 14, 14), {"dim": 192, "num_heads": 6}),
    ),
}


@dataclass
class Row:
    """The result of one variant. Errors are relative to fp64, by norm; times are of forward passes."""

    family: str
    model: str
    size: int = 0
    layers: int = 0
    classes: str = ""
    accelerated: int = 0
    left: list[str] = field(default_factory=list)
    to_pytorch: list[str] = field(default_factory=list)
    output_error: float = 0.0
    output_error_stock: float = 0.0
    gradient_error: float = 0.0
    gradient_error_stock: float = 0.0
    captured: int = 0
    timed_at: int = 0
    time_ratio: float | None = None

    @property
    def equal(self) -> bool:
        """At most twice the error of the stock model, plus a rounding: the rule of ``mimkernels.testing``."""
        return (
            self.output_error <= 2 * self.output_error_stock + torch.finfo(torch.float32).eps
            and self.gradient_error <= 2 * self.gradient_error_stock + torch.finfo(torch.float32).eps
        )


def examine(family: str, variant: Variant | LayerVariant, seconds: float = 4.0) -> Row:
    """Compare, capture and (for `seconds`; 0: not at all) time one variant."""
    torch.manual_seed(0)
    stock = variant.build(variant.size).eval()
    _with_lively_weights(stock)
    x = variant.inputs(variant.size)
    _with_fitting_batch_norms(stock, x)
    ours = copy.deepcopy(stock)
    report = accelerate(ours)
    row = Row(family, variant.model, variant.size)
    kinds = (type(part) for part in stock.modules())
    calling = Counter(kind.__name__ for kind in kinds if kind in RELATIVE or calls_sdpa(kind.forward))
    row.layers, row.classes = calling.total(), ", ".join(f"{count} {name}" for name, count in calling.items())
    # The table counts layers of attention; MLPs, blocks and the model itself are accelerated beside them.
    beside = (layers.Mlp, Block, VisionTransformer)
    others = {name for name, part in stock.named_modules() if isinstance(part, beside)}
    row.accelerated = sum(change.name not in others for change in report.accelerated)
    left = [change for change in report.left if change.name not in others]
    row.left = [f"{change.kind}: {change.reason}" for change in _distinct(left)]
    exact = _outputs_and_gradients(copy.deepcopy(stock).double(), x.double())
    row.output_error_stock, row.gradient_error_stock = _errors(_outputs_and_gradients(stock, x), exact)
    for kind in report._classes:
        kind._refused.clear()
    row.output_error, row.gradient_error = _errors(_outputs_and_gradients(ours, x), exact)
    row.accelerated -= sum(calling[kind] for kind in report.refused)
    row.to_pytorch = [f"{kind}: {'; '.join(why)}" for kind, why in report.refused.items()]
    row.captured = _captured(ours, x)
    if seconds > 0:
        row.timed_at = variant.timed
        row.time_ratio = round(_time_ratio(variant, seconds), 3)
    return row


def other_families() -> Iterator[tuple[str, str]]:
    """The modules of timm.models that are not in FAMILIES, each with the reason why attention stays as it is."""
    for name in timm.list_modules():
        if name in FAMILIES:
            continue
        module = importlib.import_module(f"timm.models.{name}")
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
        missed = [kind.__name__ for kind in kinds if calls_sdpa(kind.forward)]
        own = [kind.__name__ for kind in kinds if kind.__module__ == module.__name__ and _has_own_softmax(kind)]
        own += _NAMED_LAYERS.get(name, ())
        if missed:
            yield name, f"MISSED: {', '.join(missed)} call SDPA"
        elif own:
            yield name, f"its own softmax, without SDPA, in {', '.join(own)}"
        else:
            yield name, "no softmax attention"


# Layers of timm.layers that a family's configurations name, so that its module does not import them.
_NAMED_LAYERS = {"byoanet": ("BottleneckAttn", "HaloAttn", "LambdaLayer")}


def _has_own_softmax(kind: type[nn.Module]) -> bool:
    source = inspect.getsource(kind)
    return "softmax(" in source and ("@" in source or "matmul" in source or "einsum" in source)


def _distinct(changes: Sequence) -> list:
    return list({(change.kind, change.reason): change for change in changes}.values())


def _with_lively_weights(model: nn.Module) -> None:
    """Weights that start at zero, or nearly, hide what they multiply: layer scales, position biases, last layers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.rpartition(".")[2]
            if any(word in name for word in ("rel", "bias_table", "attention_biases")) and parameter.dim() > 1:
                parameter.normal_(0, 1, generator=generator)
            elif "gamma" in last or "scale" in last or last.startswith("ls"):
                parameter.uniform_(0.5, 1, generator=generator)
            elif parameter.numel() and parameter.abs().max() < 1e-3:
                parameter.normal_(0, 0.02, generator=generator)


def _with_fitting_batch_norms(model: nn.Module, x: Tensor) -> None:
    """Running statistics as of training: without them, activations grow until every softmax is saturated."""
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if norms:
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            model(x)
        model.eval()
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


def _outputs_and_gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    outputs = model(x)
    parts = [part.flatten(1) for part in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]
    out = torch.cat(parts, dim=1)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights.to(out.dtype)).sum().backward()
    gradients = [tensor.grad for tensor in (x, *model.parameters()) if tensor.grad is not None]
    return out.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def _errors(outputs: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    out, gradients = (((a.double() - b).norm() / b.norm()).item() for a, b in zip(outputs, exact, strict=True))
    return out, gradients


def _captured(model: nn.Module, x: Tensor) -> int:
    """How many calls of attention gave the entropy of every head and query, within its bounds."""
    try:
        with torch.no_grad(), capture(model, ["entropy"], num_prefix=0) as heads:
            model(x)
    except RuntimeError:  # no layer could be captured
        return 0
    captured = 0
    for layer in heads.values():
        entropy = layer.stats["entropy"]
        most = math.log(layer.keys) + 1e-4
        whole = entropy.shape[1:] == (layer.heads, layer.queries)
        captured += whole and bool(((entropy >= -1e-4) & (entropy <= most)).all())
    return captured


def _time_ratio(variant: Variant | LayerVariant, seconds: float) -> float:
    """Time of the accelerated model as a share of the stock one: medians, in turns, CPU time of one thread."""
    torch.manual_seed(0)
    stock = variant.build(variant.timed).eval()
    ours = copy.deepcopy(stock)
    accelerate(ours, read_tokens=False)
    x = variant.inputs(variant.timed)[: None if isinstance(variant, LayerVariant) else 1]
    times: tuple[list[float], list[float]] = ([], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for model in (stock, ours):
            model(x)
        began = time.process_time()
        while time.process_time() - began < seconds or len(times[0]) < 7:
            for model, taken in zip((stock, ours), times, strict=True):
                start = time.process_time()
                model(x)
                taken.append(time.process_time() - start)
    torch.set_num_threads(threads)
    return statistics.median(times[1]) / statistics.median(times[0])


def table(rows: Sequence[Row], others: Sequence[tuple[str, str]], machine: str) -> str:
    """The rows as docs/TIMM.md."""
    lines = [
        "# timm on mimkernels",
        "",
        f"Written by `python -m benchmarks timm-sweep` with timm {timm.__version__} and torch "
        f"{torch.__version__.partition('+')[0]} on {machine}. One row for each family of timm that calls",
        "`F.scaled_dot_product_attention` and for each class that does, with random weights, before and after",
        "`mimkernels.accelerate(model)`. Swin V2, which makes its matrix itself, is written anew like Swin and BEiT:",
        "biases are read from tables of relative positions, masks of windows added once for all images, and cosines",
        "are taken in the kernel.",
        "",
        "- *taken*: layers that run on `mimkernels.attention`, of those that call SDPA or are written anew.",
        "- *output*, *gradient*: relative errors (norms over all outputs, all gradients) against the stock model in",
        "  fp64, accelerated / stock, both in fp32.",
        "- *captured*: attention layers whose entropy was captured and lies within its bounds.",
        "- *time*: of a forward pass in fp32 on one CPU thread, accelerated as a share of stock (below 1 is faster);",
        "  medians, in turns, one image (layers: eight), with `read_tokens=False`: most models are cut to two blocks",
        "  here, of which the last would count for too much. On a busy machine, two runs differ by up to 0.05.",
        "  Empty: not timed.",
        "",
        "| family | model | classes | taken | output | gradient | captured | time | at | remarks |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        remarks = "; ".join([*row.left, *(f"to PyTorch: {why}" for why in row.to_pytorch)])
        ratio = "" if row.time_ratio is None else f"{row.time_ratio:.2f}"
        lines.append(
            f"| {row.family} | `{row.model}` | {row.classes} | {row.accelerated} of {row.layers} | "
            f"{row.output_error:.0e} / {row.output_error_stock:.0e} | "
            f"{row.gradient_error:.0e} / {row.gradient_error_stock:.0e} | {row.captured} | {ratio} | "
            f"{row.timed_at or ''} | {remarks} |"
        )
    lines += [
        "",
        "## Families whose attention stays as it is",
        "",
        "Their `Mlp` and `Block` layers are taken nevertheless, where they are timm's.",
        "",
        "| family | reason |",
        "|---|---|",
    ]
    lines += [f"| {name} | {reason} |" for name, reason in others]
    return "\n".join(lines) + "\n"


def renewed(rows: Sequence[Row], versions: dict[str, str]) -> list[Row]:
    """The rows on file with `rows` in the places of theirs; times on file stay where a row was not timed."""
    document = json.loads(JSON.read_text())
    theirs = {name: document[name] for name in versions}
    if theirs != versions:
        raise SystemExit(f"the rows on file are of {theirs}, these would be of {versions}; renew all")
    new = {(row.family, row.model): row for row in rows}
    together = []
    for old in (Row(**row) for row in document["families"]):
        row = new.get((old.family, old.model), old)
        if row.time_ratio is None:
            row.timed_at, row.time_ratio = old.timed_at, old.time_ratio
        together.append(row)
    return together


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="renews the rows of these families")
    parser.add_argument("--seconds", type=float, default=4.0, help="CPU time to time each model; 0: keep times on file")
    asked = parser.parse_args()
    rows = []
    for family, variants in FAMILIES.items():
        if asked.only and family not in asked.only:
            continue
        for variant in variants:
            row = examine(family, variant, asked.seconds)
            rows.append(row)
            print(
                f"{family:26s} {row.model:40s} {row.accelerated}/{row.layers} "
                f"{'equal' if row.equal else 'DIFFERENT'} captured {row.captured} time {row.time_ratio} "
                f"{'; '.join([*row.left, *row.to_pytorch])}",
                flush=True,
            )
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    versions = {"timm": timm.__version__, "torch": torch.__version__, "cpu": machine}
    if asked.only or asked.seconds == 0:
        rows = renewed(rows, versions)
    others = list(other_families())
    document = {**versions, "families": [asdict(row) for row in rows], "others": dict(others)}
    JSON.parent.mkdir(exist_ok=True)
    JSON.write_text(json.dumps(document, indent=1) + "\n")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(rows, others, machine))
    wrong = [row.model for row in rows if not row.equal] + [name for name, why in others if why.startswith("MISSED")]
    if wrong:
        print(f"wrong: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0
