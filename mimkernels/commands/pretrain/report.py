"""The page a person looks at after training: one HTML file without any outside reference."""

import datetime
import html
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.engine.figures import loss_curve, png_address
from mimkernels.engine.files import write_text
from mimkernels.engine.progress import count, duration

_PICTURE_WIDTH = 128  # pixels on the page that a small picture is enlarged to, at least


@dataclass
class Report:
    """What the page tells."""

    config: PretrainConfig
    facts: dict[str, str]
    entries: list[dict[str, float]]
    heads: str | None  # picture of the head statistics as a data address
    steps_per_epoch: int
    pictures: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # original, masked, reconstruction
    pictures_are_new: bool  # not seen in training
    held_out_loss: float | None
    versions: dict[str, str]
    backends: dict[str, str]


def write_report(path: Path, report: Report) -> Path:
    write_text(path, render(report))
    return path


def render(report: Report) -> str:
    """The whole page."""
    config = report.config
    title = config.title or f"{config.method.upper()} pre-training of {config.model} on {config.data}"
    parts = [_tiles(report), _curve(report), _pictures(report), _heads(report), _facts(report)]
    written = f"Written by mimkernels {report.versions['mimkernels']} on {datetime.date.today():%d %B %Y}."
    return page(title, _lead(report), "\n".join(parts), written)


def page(title: str, lead: str, body: str, written: str) -> str:
    """A page of its own, in the style that reports share; `lead` and `body` are HTML, `title` and `written` text."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body><main>
<header><p class=kicker>mimkernels</p><h1>{html.escape(title)}</h1><p class=lead>{lead}</p></header>
{body}
<footer>{html.escape(written)}</footer>
</main></body>
</html>
"""


def add_sections(path: Path, sections: str) -> None:
    """Put further sections into a written report, before the last, which says what was run."""
    before, last, after = path.read_text(encoding="utf-8").rpartition(_LAST_SECTION)
    write_text(path, f"{before}{sections}\n{last}{after}")


_LAST_SECTION = "<section><h2>What was run</h2>"


def _lead(report: Report) -> str:
    config = report.config
    return (
        f"The model sees {1 - config.mask_ratio:.0%} of each image's patches and learns to paint the other "
        f"{config.mask_ratio:.0%}. No labels are used."
    )


def _tiles(report: Report) -> str:
    if not report.entries:  # their file was lost
        return ""
    last = report.entries[-1]
    rates = sorted(entry["images_per_second"] for entry in report.entries)
    tiles = [
        (f"{last['loss']:.4g}", f"training loss, from {report.entries[0]['loss']:.4g}"),
        (count(rates[len(rates) // 2]), "images per second, median"),
        (duration(last["seconds"]), f"for {report.config.epochs} epochs, {last['step']:,} steps"),
    ]
    if report.held_out_loss is not None:
        tiles.insert(1, (f"{report.held_out_loss:.4g}", "loss on new images"))
    cells = "".join(f"<div><b>{value}</b><span>{html.escape(label)}</span></div>" for value, label in tiles)
    return f"<section class=tiles>{cells}</section>"


def _curve(report: Report) -> str:
    if not report.entries:
        return ""
    kind = (
        "each patch normalised by its own mean and variance" if report.config.norm_pix_loss else "of normalised pixels"
    )
    return (
        "<section><h2>Loss</h2>"
        f"<p>Mean squared error on the masked patches, {kind}. Each point is the mean of the steps since the "
        "one before; the strong line is a running mean.</p>"
        f"<figure class=curve>{loss_curve(report.entries, report.steps_per_epoch)}</figure></section>"
    )


def _pictures(report: Report) -> str:
    if report.pictures is None:
        return ""
    originals, masked, reconstructions = report.pictures
    # Whole multiples keep the pixels of small images square and equal.
    size = originals.shape[-1]
    side = size * max(1, -(-_PICTURE_WIDTH // size))
    enlarged = " enlarged" if side > size else ""
    whose = "Images that were not trained on." if report.pictures_are_new else "Images from the training data."
    note = (
        " Brightness and contrast of each painted patch are those of the original, as the loss ignores them."
        if report.config.norm_pix_loss
        else ""
    )
    cards = []
    for number, triple in enumerate(zip(originals, masked, reconstructions, strict=True), 1):
        cells = "".join(
            f'<figure><img src="{png_address(image)}" alt="image {number}, {label}">'
            f"<figcaption>{label}</figcaption></figure>"
            for image, label in zip(triple, ("original", "masked", "reconstruction"), strict=True)
        )
        cards.append(f"<div class=card>{cells}</div>")
    return (
        f"<section><h2>Reconstructions</h2><p>{whose} The model is given the middle picture only; "
        f"its own visible patches are kept in the right one.{note}</p>"
        f'<div class="cards{enlarged}" style="--side:{side}px">{"".join(cards)}</div></section>'
    )


def _heads(report: Report) -> str:
    if report.heads is None:
        return ""
    return (
        "<section><h2>What the heads do</h2><p>One dot per attention head of the encoder, averaged over the patches "
        "and images of a training step; the line is each layer's mean. Distances are in patches, entropies in nats.</p>"
        f'<figure><img class=plot src="{report.heads}" alt="statistics of the attention heads per layer"></figure>'
        "</section>"
    )


def _facts(report: Report) -> str:
    rows = {
        **report.facts,
        "Kernels": _backends(report.backends),
        "Versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    cells = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows.items() if v)
    settings = html.escape(json.dumps(report.config.to_dict(), indent=2))
    return (
        f"{_LAST_SECTION}<dl>{cells}</dl>"
        f"<details><summary>All settings</summary><pre>{settings}</pre></details></section>"
    )


def _backends(backends: dict[str, str]) -> str:
    names = sorted(set(backends.values()))
    return "; ".join(f"{name}: {', '.join(op for op in backends if backends[op] == name)}" for name in names)


_STYLE = """
:root{color-scheme:light;--ink:#1c2430;--muted:#5d6877;--line:#e3e7ec;--accent:#0b66c3}
*{box-sizing:border-box}
body{margin:0;background:#f5f7f9;color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 56px}
.kicker{margin:0;color:var(--accent);font-weight:600;letter-spacing:.02em}
h1{margin:.1em 0 .3em;font-size:clamp(1.6rem,4vw,2.3rem);line-height:1.2;letter-spacing:-.015em}
h2{margin:0 0 .3em;font-size:1.25rem}
.lead{margin:0;font-size:1.1rem;color:var(--muted)}
section{margin-top:24px;padding:24px;background:#fff;border:1px solid var(--line);border-radius:14px}
section>p{margin:.1em 0 1em;color:var(--muted);max-width:75ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:0;padding:8px 0}
.tiles div{padding:14px 24px;border-left:1px solid var(--line);margin-left:-1px}
.tiles b{display:block;font-size:1.9rem;line-height:1.2;font-variant-numeric:tabular-nums;letter-spacing:-.02em}
.tiles span{color:var(--muted);font-size:.92rem}
figure{margin:0}
.curve{overflow-x:auto}
.curve svg{display:block;width:100%;min-width:640px;height:auto}
.cards{display:grid;gap:18px;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,calc(3*min(var(--side),128px) + 42px)),1fr))}
.card{display:grid;grid-template-columns:repeat(3,1fr);gap:8px;padding:12px;
  border:1px solid var(--line);border-radius:10px;background:#fbfcfd}
.card img{display:block;width:100%;max-width:var(--side);margin:0 auto;border-radius:4px}
.enlarged img{image-rendering:pixelated}
.plot{display:block;width:100%;height:auto}
figcaption{margin-top:4px;text-align:center;font-size:.85rem;color:var(--muted)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:8px 24px;margin:0 0 16px}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--accent)}
pre{overflow:auto;padding:16px;background:#f5f7f9;border-radius:8px;font-size:.85rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 14px 7px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child,th:last-child,td:last-child{text-align:left}
td:last-child{white-space:normal;color:var(--muted);padding-left:10px}
th{font-weight:600;color:var(--muted)}.best td{font-weight:600}
.maps{width:auto}.maps th,.maps td,.maps td:last-child{padding:4px 8px 4px 0;text-align:center;border:0}
.maps th{font-size:.9rem}.maps img{display:block;width:100%;min-width:72px;max-width:128px;border-radius:4px}
footer{margin-top:24px;color:var(--muted);font-size:.9rem}
@media (max-width:640px){main{padding:24px 14px}section{padding:16px}
  dl{grid-template-columns:1fr;gap:2px}dd{margin-bottom:10px}}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
