"""Visibilities on disk: the comma-separated form of the Event Horizon Telescope's releases."""

import os
from pathlib import Path

import numpy as np

from scoreprior.interferometry.visibilities import Visibilities

COLUMNS = (
    "time(UTC)",
    "T1",
    "T2",
    "U(lambda)",
    "V(lambda)",
    "Iamp(Jy)",
    "Iphase(d)",
    "Isigma(Jy)",
)
"""Columns of a Stokes I file, in this order."""


def read_eht_csv(path: str | os.PathLike[str]) -> Visibilities:
    """The table in a Stokes I file of an EHT release, such as that of M87 in 2017.

    The release is "First M87 EHT Results: Calibrated Data", doi:10.25739/g85n-f134. Lines that
    start with `#` are comments; one of them, before the data, names the columns, which must be
    `COLUMNS`. A data line is time in hours, two stations, `u` and `v` in wavelengths, amplitude in
    Jy, phase in degrees and `sigma` in Jy, the noise of the real part and of the imaginary part.

    The releases have `V = sum_k I_k exp(+2 pi i (u l_k + v m_k))`, as eht-imaging does
    (`ftmatrix`). `u` and `v` are read with their signs turned, so that `Visibilities` has them by
    its own definition: with those of the file images come out turned by 180 degrees, and the bright
    side of M87's ring, which is in the south, lies in the north.

    Raises `ValueError` for a file of another format, and for values that are NaN, infinite or mark
    flagged data (`sigma` zero or negative), with the number of the line, what was expected and what
    was found.
    """
    rows, named = [], False
    with Path(path).open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if text.startswith("#"):
                named = _is_header(text, number, path) or named
            elif text:
                where = f"{path}, line {number}"
                if not named:
                    raise ValueError(
                        f"{where}: expected a comment that names the columns, "
                        f"#{','.join(COLUMNS)}, before the data, found {text[:60]!r}"
                    )
                rows.append(_parse(text, where))
    if not rows:
        raise ValueError(f"{path}: expected lines of {len(COLUMNS)} values, found none")
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    time, one, two, u, v, amplitude, degrees, sigma = columns
    vis = amplitude * np.exp(1j * np.deg2rad(degrees))
    return Visibilities(time, one, two, -u, -v, vis, sigma)


def _is_header(text: str, number: int, path: str | os.PathLike[str]) -> bool:
    names = tuple(name.strip() for name in text.lstrip("# ").split(","))
    if names[0] != COLUMNS[0]:
        return False
    if names != COLUMNS:
        raise ValueError(
            f"{path}, line {number}: expected the columns {','.join(COLUMNS)} of a Stokes I file, "
            f"found {','.join(names)}"
        )
    return True


def _parse(text: str, where: str) -> tuple[float | str, ...]:
    cells = [cell.strip() for cell in text.split(",")]
    if len(cells) != len(COLUMNS):
        raise ValueError(
            f"{where}: expected {len(COLUMNS)} values separated by commas "
            f"({','.join(COLUMNS)}), found {len(cells)}: {text[:60]!r}"
        )
    values: list[float | str] = []
    for name, cell in zip(COLUMNS, cells, strict=True):
        if name in ("T1", "T2"):
            if not cell:
                raise ValueError(f"{where}: expected the code of a station as {name}, found none")
            values.append(cell)
            continue
        try:
            value = float(cell)
        except ValueError:
            raise ValueError(f"{where}: expected a number as {name}, found {cell!r}") from None
        if not np.isfinite(value):
            raise ValueError(f"{where}: expected a finite {name}, found {cell}: flag it first")
        values.append(value)
    amplitude, sigma = values[5], values[7]
    if sigma <= 0:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(
            f"{where}: expected a positive {COLUMNS[7]}, found {sigma}, which marks flagged data: "
            "take the line out"
        )
    if amplitude < 0:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{where}: expected {COLUMNS[5]} of at least 0, found {amplitude}")
    return tuple(values)
