"""Numbers as people read them: the same words in the terminal's table and on the page."""

from __future__ import annotations

from collections.abc import Mapping

MISSING = "–"
SIZE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def size(value: float | None) -> str:
    """Bytes in decimal units: 4.71 MB."""
    if value is None:
        return MISSING
    scale, unit = next((each for each in SIZE_UNITS if abs(value) >= each[0]), SIZE_UNITS[-1])
    return f"{significant(value / scale)} {unit}"


def count(value: float | None) -> str:
    """A large count: 4.3 M."""
    if value is None:
        return MISSING
    for scale, unit in COUNT_UNITS:
        if abs(value) >= scale:
            return f"{significant(value / scale)} {unit}"
    return f"{value:,.0f}"


def significant(value: float) -> str:
    """Three significant digits, all digits before the point: 0.123, 4.71, 87.4, 1,204."""
    return f"{value:,.{_places(value)}f}"


def _places(value: float) -> int:
    """Digits behind the point that make three significant ones."""
    return next((places for limit, places in ((0.9995, 3), (9.995, 2), (99.95, 1)) if abs(value) < limit), 0)


def bits(value: float | None) -> str:
    """Bits per byte: 1.413."""
    return MISSING if value is None else f"{value:.3f}"


def bits_with_interval(value: float | None, half_width: float | None) -> str:
    """Bits per byte with its 95 % interval: 1.413 ± 0.012."""
    return bits(value) if value is None or half_width is None else f"{value:.3f} ± {half_width:.3f}"


def signed(value: float, places: int) -> str:
    """With its sign, and a real minus: +0.061, −0.002; without one when it rounds to nothing."""
    if round(value, places) == 0:
        return f"{0:.{places}f}"
    return f"{value:+.{places}f}".replace("-", "−")


def small(value: float | None) -> str:
    """A number that may be tiny: 3.9, 0.0143, 3.1e-06, 0."""
    if value is None:
        return MISSING
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def share(value: float | None) -> str:
    """A share from 0 to 1 as percent; 100 % is said only of all of it."""
    if value is None:
        return MISSING
    percent = 100 * value
    return f"{percent:.0f} %" if percent in (0.0, 100.0) else f"{min(percent, 99.99):.2f} %"


def milliseconds(value: float | None) -> str:
    """A time: 24.1 ms, 1.31 s."""
    if value is None:
        return MISSING
    return f"{significant(value)} ms" if value < 1000 else f"{significant(value / 1000)} s"


def rate(value: float | None, sd: float | None = None) -> str:
    """A speed with its standard deviation: 412 ± 6."""
    if value is None:
        return MISSING
    return significant(value) if sd is None else f"{significant(value)} ± {sd:,.{_places(value)}f}"


def duration(seconds: float | None) -> str:
    """Time that passed: 0.382 s, 4.12 s, 41 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None:
        return MISSING
    if seconds < 9.995:
        return f"{significant(seconds)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def ratio(value: float) -> str:
    """A factor: 5.4×, 12×."""
    return f"{value:.1f}×" if value < 9.95 else f"{value:.0f}×"


def figures(numbers: Mapping[str, float]) -> str:
    """A method's numbers by name: counts in full, shares with four digits."""
    return ", ".join(
        f"{name} {value:,.0f}" if value.is_integer() else f"{name} {value:.4g}" for name, value in numbers.items()
    )
