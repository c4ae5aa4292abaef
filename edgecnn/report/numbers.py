"""Figures as people read them, with units; a figure that was not measured says so."""

from __future__ import annotations

import math

NOT_MEASURED = "not measured"


def ms_text(value: float | None) -> str:
    """Return a duration given in milliseconds, to three digits, in µs, ms or s.

    Example:
        >>> ms_text(0.0612), ms_text(0.5), ms_text(12.345), ms_text(1234.5), ms_text(None)
        ('61.2 µs', '0.500 ms', '12.3 ms', '1.23 s', 'not measured')
    """
    if value is None:
        return NOT_MEASURED
    if abs(value) < 0.1:
        return f"{digits(value * 1e3)} µs" if value else "0 ms"
    return f"{digits(value)} ms" if abs(value) < 1000 else f"{digits(value / 1e3)} s"


def bytes_text(size: float | None) -> str:
    """Return bytes in kB, MB or GB (powers of ten).

    Example:
        >>> bytes_text(304_283), bytes_text(1_084_123), bytes_text(12), bytes_text(None)
        ('304 kB', '1.08 MB', '12 B', 'not measured')
    """
    if size is None:
        return NOT_MEASURED
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size) >= factor:
            return f"{digits(size / factor)} {unit}"
    return f"{size:.0f} B"


def count_text(number: float | None) -> str:
    """Return a count in k, M or G.

    Example:
        >>> count_text(269_722), count_text(40_551_040), count_text(97)
        ('270 k', '40.6 M', '97')
    """
    if number is None:
        return NOT_MEASURED
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{digits(number / factor)} {unit}"
    return f"{number:g}"


def percent_text(fraction: float | None, decimals: int = 2) -> str:
    """Return a fraction in percent; 100 % only if it is all of them.

    Example:
        >>> percent_text(0.998), percent_text(0.99999), percent_text(1.0), percent_text(0.5, 0)
        ('99.80 %', '99.99 %', '100 %', '50 %')
    """
    if fraction is None:
        return NOT_MEASURED
    if fraction == 1:
        return "100 %"
    return f"{min(100 * fraction, 100 - 10.0**-decimals):.{decimals}f} %"


def points_text(points: float | None) -> str:
    """Return a change of accuracy in percentage points, with its sign.

    Example:
        >>> points_text(-0.1), points_text(0.25), points_text(0.001)
        ('−0.10 points', '+0.25 points', 'no change')
    """
    if points is None:
        return NOT_MEASURED
    if abs(points) < 0.005:
        return "no change"
    return f"{points:+.2f} points".replace("-", "−")


def ratio_text(ratio: float) -> str:
    """Return a ratio.

    Example:
        >>> ratio_text(1.836), ratio_text(12.34), ratio_text(350)
        ('1.84×', '12.3×', '350×')
    """
    return f"{digits(ratio)}×"


def time_axis(high_ms: float) -> tuple[float, str]:
    """Return what to multiply milliseconds by, and the unit, for an axis up to `high_ms`.

    Example:
        >>> time_axis(0.05), time_axis(12), time_axis(20_000)
        ((1000.0, 'µs'), (1.0, 'ms'), (0.001, 's'))
    """
    if high_ms < 0.1:
        return 1e3, "µs"
    return (1.0, "ms") if high_ms < 10_000 else (1e-3, "s")


def range_text(low: float, high: float, significant: int = 3) -> str:
    """Return two numbers with the same decimals: those of the larger one, or more to tell them apart.

    Example:
        >>> range_text(0.98, 1.03), range_text(4.993, 5.01, 4), range_text(1.0102, 1.0138)
        ('0.98–1.03', '4.993–5.010', '1.010–1.014')
    """
    decimals = max(significant - 1 - (math.floor(math.log10(abs(high))) if high else 0), 0)
    while low != high and f"{low:.{decimals}f}" == f"{high:.{decimals}f}" and decimals < 6:
        decimals += 1
    return "–".join(f"{value:.{decimals}f}" for value in (low, high))


def interval_ms_text(interval_ms: tuple[float, ...] | None) -> str:
    """Return an interval of durations given in milliseconds, with its unit.

    Example:
        >>> interval_ms_text((4.993, 5.01)), interval_ms_text((0.0312, 0.0319)), interval_ms_text(None)
        ('4.993–5.010 ms', '31.20–31.90 µs', 'too few runs')
    """
    if interval_ms is None:
        return "too few runs"
    factor, unit = time_axis(interval_ms[1])
    return f"{range_text(interval_ms[0] * factor, interval_ms[1] * factor, 4)} {unit}"


def digits(value: float) -> str:
    """Return a number to three significant digits, without an exponent.

    Example:
        >>> digits(0.01234), digits(9.999), digits(56.78), digits(123.4), digits(0.0)
        ('0.0123', '10.0', '56.8', '123', '0')
    """
    if value == 0:
        return "0"
    magnitude = abs(float(f"{value:.2e}"))
    decimals = 2
    while magnitude < 1 and decimals < 8:
        magnitude *= 10
        decimals += 1
    while magnitude >= 10 and decimals > 0:
        magnitude /= 10
        decimals -= 1
    return f"{value:.{decimals}f}".replace("-", "−")
