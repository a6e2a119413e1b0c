"""The parts of a report: a page, its tables, its figures.  One file, no script, nothing loaded from elsewhere.

Text is escaped wherever it comes from.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.schema import REPORT_FILE, UserError
from pipeline.storage.files import write_atomically

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
p { color: #555; margin: .2rem 0 .8rem; } img { width: 100%; } .plots img { width: 49%; margin-bottom: .6rem; }
pre { background: #f6f6f6; padding: .8rem; overflow: auto; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem .9rem .2rem .3rem; }
td { border-top: 1px solid #ddd; overflow-wrap: anywhere; -webkit-print-color-adjust: exact;
     print-color-adjust: exact; } .number { text-align: right; font-variant-numeric: tabular-nums;
     white-space: nowrap; overflow-wrap: normal; }
.spread { min-width: 11rem; }
@media print { body { margin: 0; max-width: none; } table, img { break-inside: avoid; } }
"""


BINS = 40
"""Most bars of a histogram."""


class Share(float):
    """A fraction, shown in per cent with a bar behind it."""


class Spread(NamedTuple):
    """Quantiles in ascending order, as fractions of a cell's width: a pale band, a darker one on it, and a mark."""

    least: float
    low: float
    middle: float
    high: float
    greatest: float


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
    if isinstance(value, Spread):
        mark = _band(value.middle - 0.005, value.middle + 0.005, COLOURS[0])
        bands = (mark, _band(value.low, value.high, "#9dbfe0"), _band(value.least, value.greatest, "#dbe7f3"))
        return f'<td class="spread" style="background: {", ".join(bands)}"></td>'
    if isinstance(value, Share):
        bar = f"linear-gradient(90deg, #dbe7f3 {value:.1%}, transparent {value:.1%})"
        return f'<td class="number" style="background: {bar}">{value:.1%}</td>'
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.{'0f' if 1e4 <= abs(value) < 1e15 else '4g'}}"
        return f'<td class="number">{text}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _band(start: float, stop: float, colour: str) -> str:
    edges = f"transparent {start:.1%}, {colour} {start:.1%} {stop:.1%}, transparent {stop:.1%}"
    return f"linear-gradient(90deg, {edges})"


def histogram(title: str, values: npt.NDArray[np.integer[Any]], counted: str) -> str:
    """An image of how many of the whole numbers ``values``, all above 0, lie where, and their median.

    Each bar is a range of them, none empty by its narrowness; where they span a factor of 30 the axis is logarithmic.
    (Drawn by hand, in a hundredth of the time that matplotlib takes to be imported and to draw it.)
    """
    if not len(values):
        return f"<p>{html.escape(title)}: none</p>"
    low, high = int(values.min()), int(values.max())
    logarithmic = high > 30 * low
    step = -(-(high + 1 - low) // BINS)
    first = np.rint(np.geomspace(low, high + 1, BINS + 1)) if logarithmic else np.arange(low, high + 1 + step, step)
    edges = np.unique(first) - 0.5
    count = np.histogram(values, edges)[0]
    width, height, left, top, bottom = 450, 190, 52, 24, 160

    def across(value: Any) -> Any:
        start, stop, at = (np.log(it) if logarithmic else it for it in (edges[0], edges[-1], value))
        return left + (width - 10 - left) * (at - start) / (stop - start)

    def up(value: Any) -> Any:
        return bottom - (bottom - top - 6) * value / count.max()

    x, y = across(edges).tolist(), up(count).tolist()
    bars = "".join(f"M{x[at]:.1f} {bottom}V{y[at]:.1f}H{x[at + 1]:.1f}V{bottom}z" for at in np.flatnonzero(count))
    marks = [f'<path d="{bars}" fill="{COLOURS[0]}"/><path d="M{left} {bottom}H{width - 10}" stroke="#000"/>']
    for tick in _ticks(0, int(count.max()), logarithmic=False):
        marks.append(f'<path d="M{left} {up(tick):.1f}H{width - 10}" stroke="#000" stroke-opacity=".15"/>')
        marks.append(f'<text x="{left - 5}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:,}</text>')
    for tick in _ticks(low, high, logarithmic=logarithmic):
        marks.append(f'<path d="M{across(tick):.1f} {bottom}v4" stroke="#000"/>')
        marks.append(f'<text x="{across(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{tick:,}</text>')
    text = html.escape(f"{title}: median {np.median(values):,.4g}")
    content = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><text x="{left}" y="14" font-size="12">{text}</text>{"".join(marks)}'
        f'<text x="{left + 3}" y="{top + 3}" fill="#555">{html.escape(counted)}</text></svg>'
    )
    return _image(text, content.encode())


def _ticks(low: int, high: int, *, logarithmic: bool) -> list[int]:
    """Round numbers from ``low`` to ``high``, about five of them."""
    powers = [10**exponent for exponent in range(len(str(high)) + 1)]
    if logarithmic:
        every = [digit * power for power in powers for digit in (1, 2, 5)]
        return [tick for tick in (every if high < 300 * low else powers) if low <= tick <= high]
    step = next(digit * power for power in powers for digit in (1, 2, 5) if digit * power * 5 >= high - low)
    return list(range(-(-low // step) * step, high + 1, step))


def figure(description: str, rows: int, columns: int, draw: Callable[[list[Axes]], None]) -> str:
    """An image element with ``rows`` × ``columns`` axes that ``draw`` fills."""
    import matplotlib  # noqa: PLC0415 (half a second that only a report needs)
    from matplotlib.figure import Figure  # noqa: PLC0415

    with matplotlib.rc_context(FIGURE_STYLE):
        drawing = Figure(figsize=(9, 0.4 + 2.5 * rows), layout="constrained")
        draw(list(drawing.subplots(rows, columns, squeeze=False).flat))
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    return _image(html.escape(description), buffer.getvalue())


def _image(description: str, svg: bytes) -> str:
    return f'<img alt="{description}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def read_summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        summary = None
    if not isinstance(summary, dict):
        raise UserError(f"{path}: not a summary; move the file away")
    return summary


def flatten(summary: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Names and values of a nested summary, an interval beside its value."""
    rows: list[tuple[str, Any]] = []
    for name, value in summary.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{name} ")
        elif not name.endswith(("_low", "_high")):
            low, high = summary.get(f"{name}_low"), summary.get(f"{name}_high")
            with_interval = is_finite(value) and is_finite(low) and is_finite(high)
            shown = f"{value:.4g} (95 %: {low:.4g} to {high:.4g})" if with_interval else value
            rows.append((f"{prefix}{name}", shown))
    return rows


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
