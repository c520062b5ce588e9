"""SVG bar charts of medians with interquartile ranges, for light and dark backgrounds."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple
from xml.sax.saxutils import escape


class Bar(NamedTuple):
    """A median, and the quartiles below and above it."""

    label: str
    unit: str
    value: float
    low: float
    high: float


_LABELS, _BARS, _NUMBERS, _LINE = 190, 440, 90, 24
_WIDTH = _LABELS + _BARS + _NUMBERS

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.unit { fill: #59636e }
.bar { fill: #0969da }
.spread { stroke: #1f2328; stroke-width: 2 }
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
    body = "\n".join(elements)
    size = f'width="{_WIDTH}" height="{y + 8}" viewBox="0 0 {_WIDTH} {y + 8}"'
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
