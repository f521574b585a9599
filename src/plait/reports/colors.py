"""Numbers → colors, the same on the page and in figures. Readable for people who cannot distinguish red from green."""

from __future__ import annotations

Color = tuple[int, int, int]
# a diverging scale: orange for harm, white for nothing, blue for good
_LOW, _MIDDLE, _HIGH = (202, 85, 14), (250, 250, 250), (31, 95, 167)


def diverging(value: float) -> Color:
    """Return the color of a value in [−1, 1]; values beyond take the end's color."""
    return _mix(_MIDDLE, _HIGH if value >= 0 else _LOW, abs(value))


def sequential(value: float) -> Color:
    """Return the color of a value in [0, 1], on a scale from nothing to much."""
    return _mix(_MIDDLE, _LOW, value)


def text_color(background: Color) -> str:
    """Return black or white, whichever reads better on a background (relative luminance, WCAG 2)."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if luminance > 0.179 else "#fff"


def css(color: Color) -> str:
    """Return a color as CSS spells it."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def _mix(a: Color, b: Color, share: float) -> Color:
    share = min(1.0, max(0.0, share))
    mixed = [round(x + (y - x) * share) for x, y in zip(a, b, strict=True)]
    return mixed[0], mixed[1], mixed[2]
