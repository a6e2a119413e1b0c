"""The parts of a report: a page, its tables, its figures.  One file, no script, nothing loaded from elsewhere.

Text is escaped wherever it comes from.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.schema import REPORT_FILE
from pipeline.shards import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1f5a96", "#d9730d", "#2a7f62", "#8a3f8f", "#a5321f", "#6b6b6b")

FIGURE_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.hashsalt": "seqsetvae",  # equal data, equal bytes
}

PAGE_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { color: #555; margin: .2rem 0 .8rem; } img { width: 100%; }
pre { background: #f6f6f6; padding: .8rem; overflow: auto; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem .9rem .2rem .3rem; }
td { border-top: 1px solid #ddd; overflow-wrap: anywhere; } .number { text-align: right;
       font-variant-numeric: tabular-nums; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
@media print { body { margin: 0; max-width: none; } table, img { break-inside: avoid; } }
"""


class Share(float):
    """A fraction, shown in per cent with a bar behind it."""


def write_page(directory: Path, title: str, headline: dict[str, Any], sections: Iterable[str]) -> Path:
    """Write the page as the directory's report, with a table of ``headline`` on top; its path."""
    name = html.escape(directory.resolve().name)
    page = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}: {name}</title>\n'
        f"<style>{PAGE_STYLE}</style>\n<h1>{title}</h1>\n<p>{name}</p>\n{table((), headline.items())}\n"
        + "\n".join(sections)
        + "\n</html>\n"
    )
    path = directory / REPORT_FILE
    write_atomically(path, page.encode("utf-8", "xmlcharrefreplace"))
    return path


def section(title: str, content: str, note: str = "") -> str:
    """A heading, ``note`` below it, and ``content``, which is HTML already."""
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(note)}</p>{content}</section>"


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows of strings, numbers, shares and None (shown as a dash, as NaN is)."""
    cells = ["".join(f"<th>{html.escape(name)}</th>" for name in header)] if header else []
    cells += ["".join(map(_cell, row)) for row in rows]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return '<td class="number">–</td>'
    if isinstance(value, Share):
        bar = f"linear-gradient(90deg, #dbe7f3 {value:.1%}, transparent {value:.1%})"
        return f'<td class="number" style="background: {bar}">{value:.1%}</td>'
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        return f'<td class="number">{text}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def figure(description: str, rows: int, columns: int, draw: Callable[[list[Axes]], None]) -> str:
    """An image element with ``rows`` × ``columns`` axes that ``draw`` fills."""
    import matplotlib  # noqa: PLC0415 (half a second that only a report needs)
    from matplotlib.figure import Figure  # noqa: PLC0415

    with matplotlib.rc_context(FIGURE_STYLE):
        drawing = Figure(figsize=(9, 0.4 + 2.5 * rows), layout="constrained")
        draw(list(drawing.subplots(rows, columns, squeeze=False).flat))
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/svg+xml;base64,{content}">'
