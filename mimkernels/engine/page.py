"""Reports: one HTML file each, without any outside reference, from jinja2 templates that lie beside the code."""

import datetime
import functools
import importlib.util
from pathlib import Path
from typing import Any

import jinja2

from mimkernels import _palette
from mimkernels._version import __version__
from mimkernels.engine.files import write_text

_PACKAGE = Path(__file__).parents[1]
# Every page has figures, which are drawn when the work is done: a command is refused before it.
if importlib.util.find_spec("matplotlib") is None:
    raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render a template into the file `path`; the arguments are those of ``render``."""
    write_text(path, render(template, **values))
    return path


def write_with_numbers(folder: Path, page: str, numbers: str, settings: str) -> Path:
    """A page as text, the numbers that it shows and the settings that both are of, as JSON.

    Whenever this is killed, a page that is there is of the numbers beside it: the one before is removed first, and the
    new one written last.
    """
    path = folder / "report.html"
    path.unlink(missing_ok=True)
    write_text(folder / "numbers.json", numbers + "\n")
    write_text(folder / "config.json", settings)
    write_text(path, page)
    return path


def render(template: str, **values: Any) -> str:
    """A page as text.

    Args:
        template: its path in the package, such as ``commands/probe/templates/report.html``. It extends
            ``engine/templates/page.html``.
        values: what the template shows. All of it is escaped but ``markupsafe.Markup``; an unknown name is an error.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PACKAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(palette=_palette, version=__version__, today=lambda: f"{datetime.date.today():%d %B %Y}")
    return environment
