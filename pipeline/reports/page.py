"""What every report is made of: a page from a Jinja2 template, figures drawn by matplotlib, and summaries in JSON.

A page is one file without a script that loads nothing from elsewhere.  Jinja2 escapes all text, and figures hold names
from data only as :func:`figure_label` gives them, so that no name can break a page or a figure.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import jinja2
import yaml

from pipeline.schema import UserError
from pipeline.storage.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

MAX_TEXT = 300  # characters of a table's cell; longer text is cut
MAX_LABEL = 40  # characters of a name inside a figure


def write_page(path: Path, template: str, *, package: str = "pipeline.reports", **context: Any) -> Path:
    """Render a template with the variables ``context``, write the page atomically to ``path`` and return that.

    The template is a file in the folder ``templates`` of ``package`` or of this package.
    """
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(package), jinja2.PackageLoader("pipeline.reports")])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"flatten": flatten, "text": format_value}
    page = environment.get_template(template).render(context)
    # HTML allows neither control characters nor lone surrogates, which names and messages may hold.
    write_atomically(path, re.sub(r"[^\t\n -~\xa0-\ud7ff\ue000-\U0010ffff]", "\ufffd", page).encode())
    return path


def format_value(value: object) -> str:
    """Return the text of a table's cell; None and numbers that are not finite are a dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float) and not is_finite(value)):
        return "–"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.{'0f' if 1e4 <= abs(value) < 1e15 else '4g'}}"
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def figure_label(name: str) -> str:
    """Return a name from data as it may stand in a figure: short, in ASCII, and no formula of matplotlib."""
    text = name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 3]}..."
    return re.sub(r"[^ -~]", "?", text).replace("$", r"\$")


def draw_figure(panels: Mapping[str, Callable[[Axes], None]]) -> str | None:
    """Return an SVG image as a ``data:`` address; None without ``panels``, which draw each of the axes by its title."""
    import matplotlib  # noqa: PLC0415 (half a second that only a report needs)
    from matplotlib.figure import Figure  # noqa: PLC0415 (unlike pyplot it has neither global state nor a window)

    if not panels:
        return None
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(fname=Path(__file__).with_name("figure.mplstyle")):
        figure = Figure(figsize=(9, 0.4 + 2.5 * rows), layout="constrained")
        legend: dict[str, Artist] = {}
        for number, (title, draw) in enumerate(panels.items(), start=1):
            axis = figure.add_subplot(rows, columns, number, title=title)
            draw(axis)
            legend |= zip(*reversed(axis.get_legend_handles_labels()), strict=True)
        if legend:
            figure.legend([*legend.values()], [*legend], loc="outside lower center", ncols=4)
        figure.savefig(buffer := io.BytesIO(), format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON or YAML file, empty where there is no file; UserError if it holds anything else."""
    parse = yaml.safe_load if path.suffix == ".yaml" else json.loads
    try:
        content = parse(path.read_bytes()) if path.exists() else {}
    except (ValueError, RecursionError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not an object of names and values; move the file away")
    return content


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested objects by their joined names; an interval stands in the text of its value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name} ")
        elif is_finite(value) and is_finite(low) and is_finite(high):
            flat[f"{prefix}{name}"] = f"{value:.4g} (95 %: {low:.4g} to {high:.4g})"
        elif not str(name).endswith(("_low", "_high")):
            flat[f"{prefix}{name}"] = value
    return flat


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is a finite number that a float can hold."""
    return isinstance(value, int | float) and -1e300 < value < 1e300
