"""Ring features of an image: diameter, width, orientation, asymmetry, depth of the centre.

`Paper4` below is The EHT Collaboration (2019), "First M87 Event Horizon Telescope Results. IV",
ApJL 875, L4, whose section 9 defines what is measured, as its method REx does. An image is [row,
column], with row 0 in the north and column 0 in the east: pixel (r, c) of `n` x `n` pixels of size
`p` is at `l = ((n - 1) / 2 - c) p` to the east and `m = ((n - 1) / 2 - r) p` to the north. Position
angles `theta` are from north to east; `I(r, theta)` is the image about a centre, by cubic
interpolation, and zero outside of the centres of the outermost pixels.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from scoreprior._util import check_positive

FINE = 8
"""Points per pixel at which the image is interpolated; between them it is bilinear."""


class Ring(NamedTuple):
    """What `measure_ring` finds, in the units of the pixel and in radians.

    `center` is `(l, m)`. `diameter` and `width` are means over position angles, with their standard
    deviations over them. `peaked` is the share of position angles whose profile peaks inside the
    range of radii, and `resolved` of those whose profile also falls to half on both sides: both are
    one for a ring, and `peaked` is near zero for a featureless blob.
    """

    center: tuple[float, float]
    diameter: float
    diameter_sd: float
    width: float
    width_sd: float
    orientation: float
    asymmetry: float
    central_brightness: float
    peaked: float
    resolved: float


def measure_ring(
    image: Float[np.ndarray, "n n"],
    pixel: float,
    *,
    radii: tuple[float, float],
    center: tuple[float, float] | None = None,
) -> Ring:
    """Features of a ring with radii within `radii`, as section 9 of `Paper4` defines them.

    With `r_pk(theta)` the radius at which `I(r, theta)` is largest, the centre is where the
    standard deviation of `r_pk` over `theta` is smallest in units of its mean, and

        diameter           = 2 <r_pk>,
        width              = <full width at half maximum of I(r, theta) - I_floor>,
        orientation        = arg of the first moment over theta,
        asymmetry          = <|int I e^(i theta) dtheta| / int I dtheta>, from 0 to 1,
        central_brightness = <I over r below radii[0]> / <I(diameter / 2, theta)>,

    with means over `theta` or, for the moments, over radii within half a width of the ring;
    `I_floor` is the mean of `I(radii[1], theta)`. Widths are of the angles where the profile falls
    to half on both sides: where there are none, `width` and what follows from it is NaN. A thin
    ring of diameter `d` blurred to a full width `w` peaks at `d - w^2 / (4 ln(2) d)`. Of pixels of
    a fifth of the radius, results are right to a tenth of a pixel (diameter) and a fifth (width).

    **Arguments:** `image`, brightness; `pixel`, the size of a pixel, in any unit, that of all
    results; `radii`, of the range searched, 5 and 50 micro-arcseconds in `Paper4`; `center`, to
    measure about a given `(l, m)` and search none.

    Raises `ValueError` for an image that is not square, has entries that are NaN or infinite, or no
    positive total, for radii outside of the image, and where no centre has a ring about it.
    """
    image = np.asarray(image, float)
    _check(image, pixel, radii)
    fine = _upsample(image)
    span = (radii[0] / pixel, radii[1] / pixel)
    if center is None:
        place = _find_center(image, fine, span)
    else:
        half = (len(image) - 1) / 2
        place = np.array([half - center[1] / pixel, half - center[0] / pixel])
    half = (len(image) - 1) / 2
    l, m = (half - place[1]) * pixel, (half - place[0]) * pixel  # noqa: E741
    return _measure(fine, place, span, pixel, (float(l), float(m)))


def _check(image: np.ndarray, pixel: float, radii: tuple[float, float]) -> None:
    if image.ndim != 2 or image.shape[0] != image.shape[1]:
        raise ValueError(f"image must be square, [n, n], got shape {image.shape}")
    if not np.isfinite(image).all():
        bad = int((~np.isfinite(image)).sum())
        raise ValueError(f"image must be finite, got {bad} of {image.size} pixels NaN or infinite")
    if not image.sum() > 0:
        raise ValueError(f"image must have a positive total, got {image.sum()}")
    check_positive("pixel", pixel)
    inner, outer = radii
    if not 0 < inner < outer < len(image) * pixel / 2:
        raise ValueError(
            f"radii must rise from above 0 to below half the image, {len(image) * pixel / 2:.4g}, "
            f"got {radii}"
        )


def _upsample(image: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "k k"]:
    """The image at `FINE` points per pixel, by cubic convolution (Keys 1981, a = -1/2)."""
    n = len(image)
    distance = np.abs(np.arange(FINE * (n - 1) + 1)[:, None] / FINE - np.arange(n))
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    kernel = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return kernel @ image @ kernel.T


def _profiles(
    fine: Float[np.ndarray, "k k"],
    centers: Float[np.ndarray, "c 2"],
    radii: Float[np.ndarray, " r"],
    num_angles: int,
) -> Float[np.ndarray, "c r theta"]:
    """`I(r, theta)` about each center (row, column), in pixels; angles from north to east."""
    theta = 2 * np.pi * np.arange(num_angles) / num_angles
    steps = np.stack([np.multiply.outer(radii, f(theta)) for f in (np.cos, np.sin)])
    # North is up, to lower rows, and east is to the left, to lower columns.
    at = FINE * (centers.T[:, :, None, None] - steps[:, None])
    inside = ((at >= 0) & (at <= len(fine) - 1)).all(0)
    low = np.clip(np.floor(at).astype(int), 0, len(fine) - 2)
    (row, col), (a, b) = low, at - low
    values = (1 - a) * ((1 - b) * fine[row, col] + b * fine[row, col + 1])
    values += a * ((1 - b) * fine[row + 1, col] + b * fine[row + 1, col + 1])
    return np.where(inside, values, 0.0)


def _peaks(
    profiles: Float[np.ndarray, "c r theta"], radii: Float[np.ndarray, " r"]
) -> tuple[Float[np.ndarray, "c theta"], np.ndarray]:
    """Radii of the largest brightness, by a parabola, and whether they are inside the range."""
    top = profiles.argmax(1)
    inside = (top > 0) & (top < len(radii) - 1)
    middle = np.clip(top, 1, len(radii) - 2)
    down, mid, up = (
        np.take_along_axis(profiles, (middle + k)[:, None], 1)[:, 0] for k in (-1, 0, 1)
    )
    bend = down - 2 * mid + up
    shift = np.where(inside & (bend < 0), (down - up) / np.where(bend < 0, 2 * bend, 1.0), 0.0)
    return radii[top] + shift * (radii[1] - radii[0]), inside


def _find_center(
    image: np.ndarray, fine: np.ndarray, span: tuple[float, float]
) -> Float[np.ndarray, " 2"]:
    """Where `r_pk` is most regular: on a grid of every other pixel, refined five times."""
    weight = np.maximum(image, 0) / np.maximum(image, 0).sum()
    axis = np.arange(len(image))
    centroid = np.array([weight.sum(1) @ axis, weight.sum(0) @ axis])
    reach = np.arange(-span[1], span[1] + 1, 2.0)
    candidates = centroid + np.stack(np.meshgrid(reach, reach, indexing="ij"), -1).reshape(-1, 2)
    close = np.hypot(*(candidates - centroid).T) <= span[1]
    candidates = candidates[close & ((candidates >= 0) & (candidates <= len(image) - 1)).all(1)]
    best = _most_regular(fine, candidates, span, 36, 0.5)
    step = np.stack(np.meshgrid(*[np.arange(-2, 3.0)] * 2, indexing="ij"), -1).reshape(-1, 2)
    for scale in (1.0, 0.5, 0.25, 0.12, 0.06):
        best = _most_regular(fine, best + scale * step, span, 72, 0.25)
    return best


def _most_regular(
    fine: np.ndarray,
    candidates: Float[np.ndarray, "c 2"],
    span: tuple[float, float],
    num_angles: int,
    spacing: float,
) -> Float[np.ndarray, " 2"]:
    radii = np.arange(span[0], span[1] + spacing / 2, spacing)
    peaks, inside = _peaks(_profiles(fine, candidates, radii, num_angles), radii)
    # About a bright spot all peaks are at the smallest radius, which is regular but no ring.
    spread = np.where(inside.mean(1) > 0.5, peaks.std(1) / peaks.mean(1), np.inf)
    if np.isinf(spread).all():
        raise ValueError(
            "image must have a ring with radii inside the range: about no centre does brightness "
            "peak inside it in more than half of all directions; give center to measure anyway"
        )
    return candidates[int(spread.argmin())]


def _measure(
    fine: np.ndarray,
    place: Float[np.ndarray, " 2"],
    span: tuple[float, float],
    pixel: float,
    center: tuple[float, float],
) -> Ring:
    num_angles, spacing = 180, 0.1
    radii = np.arange(0.0, span[1] + spacing / 2, spacing)
    profile = _profiles(fine, place[None], radii, num_angles)[0]
    searched = radii >= span[0]
    peaks, inside = _peaks(profile[None, searched], radii[searched])
    peaks, inside = peaks[0], inside[0]
    diameter = 2 * peaks.mean()
    widths = _widths(profile - profile[-1].mean(), peaks, radii)
    resolved = inside & np.isfinite(widths)
    width = widths[resolved].mean() if resolved.any() else np.nan

    band = profile[np.abs(radii - diameter / 2) <= width / 2]
    theta = 2 * np.pi * np.arange(num_angles) / num_angles
    moments, totals = band @ np.exp(1j * theta), band.sum(1)
    found = len(band) > 0
    core = profile[radii <= span[0]].mean()
    on_ring = _profiles(fine, place[None], np.array([diameter / 2]), num_angles).mean()
    return Ring(
        center=center,
        diameter=float(diameter * pixel),
        diameter_sd=float(2 * peaks.std() * pixel),
        width=float(width * pixel),
        width_sd=float(widths[resolved].std() * pixel) if resolved.any() else np.nan,
        orientation=float(np.angle(np.exp(1j * np.angle(moments)).sum()) % (2 * np.pi))
        if found
        else np.nan,
        asymmetry=float((np.abs(moments) / totals).mean()) if found else np.nan,
        central_brightness=float(core / on_ring),
        peaked=float(inside.mean()),
        resolved=float(resolved.mean()),
    )


def _widths(
    profile: Float[np.ndarray, "r theta"],
    peaks: Float[np.ndarray, " theta"],
    radii: Float[np.ndarray, " r"],
) -> Float[np.ndarray, " theta"]:
    """Full width at half maximum about each peak; NaN where a side does not fall to half."""
    widths = np.full(len(peaks), np.nan)
    for k, peak in enumerate(peaks):
        line = profile[:, k]
        top = int(np.abs(radii - peak).argmin())
        below = line < line[top] / 2
        left, right = np.flatnonzero(below[:top]), np.flatnonzero(below[top:])
        if len(left) and len(right):
            i, j = left[-1], top + right[0]
            edges = [np.interp(line[top] / 2, line[[i, i + 1]], radii[[i, i + 1]])]
            edges.append(np.interp(line[top] / 2, line[[j, j - 1]], radii[[j, j - 1]]))
            widths[k] = edges[1] - edges[0]
    return widths
