"""How far a drop in top-1 can be told on so many images.

    drop = (lost - gained) / n      lost: images that float has right and the file wrong; gained: the reverse
    standard error = sqrt(((lost + gained) / n - drop^2) / n)

Both networks see the same images, so only those on which they differ in being right make noise: with
(12 - 7) of 2,000 the error is 0.22 points, where two independent samples of 90 % would have 0.95.

Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions".
"""

from __future__ import annotations

import math


def drop_error(lost: int, gained: int, num_samples: int) -> float:
    """Return the standard error of a drop, in percentage points.

    Example: 12 lost and 7 gained of 2,000 make a drop of 0.25.
        >>> round(drop_error(12, 7, 2000), 3)
        0.218
    """
    drop = (lost - gained) / num_samples
    return 100.0 * math.sqrt(max((lost + gained) / num_samples - drop**2, 0.0) / num_samples)


def images_needed(drop: float, error: float, num_samples: int, max_drop: float) -> int | None:
    """Return on how many images the drop and one standard error would be within the budget.

    None where no number would do, since the drop alone is not below it.

    Args:
        drop: in percentage points, as measured.
        error: its standard error on `num_samples` images.
        num_samples: images.
        max_drop: the budget in percentage points.

    Example: 0.1 points are left for an error that is 0.2 on 2,000 images and must be halved.
        >>> images_needed(0.2, 0.2, 2000, 0.3), images_needed(0.3, 0.2, 2000, 0.3)
        (8000, None)
    """
    if max_drop - drop <= 1e-9:
        return None
    return math.ceil(num_samples * (error / (max_drop - drop)) ** 2 - 1e-6)


def drop_text(drop: float, error: float | None, num_samples: int) -> str:
    """Return a drop with its standard error in words.

    Example:
        >>> drop_text(0.25, 0.393, 2000)
        '0.25 +- 0.39 points on 2,000 images'
    """
    between = "" if error is None else f" +- {error:.2f}"
    return f"{drop:.2f}{between} points on {num_samples:,} images"


def unproven_text(drop: float, error: float | None, num_samples: int, max_drop: float) -> str:
    """Say that a drop is within the budget as measured, but not with its standard error; "" where it is.

    Example:
        >>> unproven_text(0.2, 0.2, 2000, 0.3)
        'measured 0.20 +- 0.20 points on 2,000 images: some 8,000 would be needed to show it'
    """
    if error is None or drop > max_drop + 1e-9 or drop + error <= max_drop + 1e-9:
        return ""
    needed = images_needed(drop, error, num_samples, max_drop)
    end = (
        "no number of images would show it"
        if needed is None
        else f"some {needed:,} would be needed to show it"
    )
    return f"measured {drop_text(drop, error, num_samples)}: {end}"
