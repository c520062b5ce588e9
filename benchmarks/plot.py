"""SVG charts for light and dark backgrounds: bars of medians with interquartile ranges, and curves."""

from __future__ import annotations

from itertools import groupby
from math import ceil, floor, log10
from typing import TYPE_CHECKING, NamedTuple
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class Bar(NamedTuple):
    """A median, and the quartiles below and above it."""

    label: str
    unit: str
    value: float
    low: float
    high: float


class Panel(NamedTuple):
    """Curves of (x, y) by their labels. Both axes are logarithmic, and the values positive."""

    title: str
    curves: Mapping[str, Sequence[tuple[float, float]]]


_LABELS, _BARS, _NUMBERS, _LINE = 190, 440, 90, 24
_WIDTH = _LABELS + _BARS + _NUMBERS

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.unit { fill: #59636e }
.bar { fill: #0969da }
.spread { stroke: #1f2328; stroke-width: 2 }
.grid { stroke: #8c959f; stroke-opacity: 0.3 }
.curve { fill: none; stroke-width: 2 }
.c0 { stroke: #218bff } .t0 { fill: #218bff }
.c1 { stroke: #8250df } .t1 { fill: #8250df }
.c2 { stroke: #2da44e } .t2 { fill: #2da44e }
.c3 { stroke: #d4740c } .t3 { fill: #d4740c }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .unit { fill: #9198a1 }
  .bar { fill: #4493f8 }
  .spread { stroke: #f0f6fc }
}
"""


def number(value: float) -> str:
    """Format a number with three significant digits."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"  # noqa: PLR2004 - three digits


def plot(title: str, subtitle: str, bars: list[Bar]) -> str:
    """Draw bars from zero. Bars of the same unit have the same scale."""
    elements = [_text(0, 16, title, "title"), _text(_LABELS, 16, subtitle, "unit")]
    y = 28
    for unit, group in groupby(bars, key=lambda bar: bar.unit):
        same = list(group)
        maximum = max(max(bar.value, bar.high, 0) for bar in same) or 1.0
        elements.append(_text(_LABELS, y + 13, unit, "unit"))
        y += _LINE
        for bar in same:
            elements += _bar(bar, y, _BARS / maximum)
            y += _LINE
    return _document(title, y, elements)


_LEFT, _HEIGHT = 60, 160
_COLORS = 4


def plot_curves(title: str, subtitle: str, panels: Iterable[Panel]) -> str:
    """Draw panels below each other."""
    elements = [_text(0, 16, title, "title"), _text(_LABELS, 16, subtitle, "unit")]
    y = 28
    for panel in panels:
        elements += [_text(_LEFT, y + 13, panel.title, "unit"), *_panel(panel, y + _LINE)]
        y += _LINE + _HEIGHT + 2 * _LINE
    return _document(title, y, elements)


def _panel(panel: Panel, top: int) -> list[str]:
    points = [point for curve in panel.curves.values() for point in curve]
    xs, ys = sorted({x for x, _ in points}), [y for _, y in points]
    bottom = floor(log10(min(ys)))
    height = max(1, ceil(log10(max(ys))) - bottom)
    span = log10(xs[-1] / xs[0]) or 1.0

    def position(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + _BARS * log10(x / xs[0]) / span,
            top + _HEIGHT * (1 - (log10(y) - bottom) / height),
        )

    elements = []
    for power in range(bottom, bottom + height + 1):
        _, y = position(xs[0], 10.0**power)
        elements.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _BARS}" y2="{y:.1f}"/>')
        elements.append(_text(0, round(y) + 4, f"{10.0**power:g}", "unit"))
    for x in xs:
        left, _ = position(x, 10.0**bottom)
        elements.append(_text(round(left) - 4, top + _HEIGHT + 18, f"{x:g}", "unit"))
    for index, (label, curve) in enumerate(panel.curves.items()):
        kind = f"curve c{index % _COLORS}"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (position(*point) for point in curve))
        elements.append(f'<polyline class="{kind}" points="{path}"/>')
        elements.append(_text(_LEFT + _BARS + 12, top + 12 + index * _LINE, label, f"t{index % _COLORS}"))
    return elements


def _document(title: str, height: int, elements: Iterable[str]) -> str:
    body = "\n".join(elements)
    size = f'width="{_WIDTH}" height="{height + 8}" viewBox="0 0 {_WIDTH} {height + 8}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return f"{head}\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n{body}\n</svg>\n"


def _bar(bar: Bar, y: int, scale: float) -> list[str]:
    low, high = _LABELS + scale * max(0.0, bar.low), _LABELS + scale * max(0.0, bar.high)
    length = scale * max(0.0, bar.value)
    middle = y + _LINE // 2 - 2
    return [
        f'<text x="{_LABELS - 8}" y="{y + 15}" text-anchor="end">{escape(bar.label)}</text>',
        f'<rect class="bar" x="{_LABELS}" y="{y + 3}" width="{max(length, 1):.1f}" height="{_LINE - 10}"/>',
        f'<line class="spread" x1="{low:.1f}" y1="{middle}" x2="{max(high, low + 1):.1f}" y2="{middle}"/>',
        _text(round(max(high, _LABELS + length)) + 8, y + 15, number(bar.value), "value"),
    ]


def _text(x: int, y: int, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(text)}</text>'
