"""TARP: coverage of regions around random points, in all parameters at once."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import ArrayLike

from scoreprior._typing import Key
from scoreprior.check._inputs import Values, check_no_nan, check_prob, pairs
from scoreprior.check._uniform import ladder, ranks
from scoreprior.check.calibration import attributes, curves

if TYPE_CHECKING:
    from xarray import DataTree
else:
    DataTree = Any


def tarp(
    truth: Values,
    draws: Values,
    *,
    key: Key | None = None,
    references: ArrayLike | None = None,
    prob: float = 0.95,
) -> DataTree:
    """Expected coverage of balls around random points, out to the truth.

    Lemos, Coogan, Hezaveh & Perreault-Levasseur (2023), "Sampling-based accuracy testing of
    posterior estimators for general inference", Algorithm 2: the credibility `f_i` is the share of
    draws nearer to a reference point `r_i` than the truth is, and the expected coverage
    `ECP(z) = P(f < z)` is `z` for a posterior that is right. It looks at all parameters at once and
    needs no density.

    Distances are Euclidean in units of the standard deviation of each parameter, over truths and
    draws together, and `r_i` are uniform in the box that holds both: that treats truth and draws
    alike, so that the ranks `num_draws f_i` are uniform exactly. Such points know nothing of the
    data, and then a posterior that ignores the data, the prior, passes (the theorem asks for all
    references, functions of the data among them); give `references` that depend on the data of
    their replicate, never on its truth, to see that.

    **Arguments:** `truth` [n, *event] and `draws` [n, num_draws, *event], or dicts of sites;
    either `key` for random references or `references` [n, entry], in the units and the order of
    the entries (of sites sorted by name); `prob`, of the bands.

    **Returns** a tree with the group `tarp`: `coverage` [parameter, level] of the one row `TARP`,
    its binomial standard error `se` and the simultaneous band `lower`, `upper` [level], `p_value`,
    `credibility` [replicate], and `atc`, the area between coverage and level for `z > 1/2`, with
    `atc_se`: below zero for a posterior that is too narrow, or biased.

    Raises `ValueError` as `sbc` does, and unless one of `key` and `references` is given.
    """
    import xarray as xr

    check_prob("prob", prob)
    found = pairs(truth, draws)
    num, num_draws, size = found.draws.shape
    everything = np.concatenate([found.truth[:, None], found.draws], 1).reshape(-1, size)
    scale = everything.std(0)
    if (scale == 0).any():
        which = [found.names[i] for i in np.flatnonzero(scale == 0)]
        raise ValueError(f"draws must vary in every parameter, got constant ones: {which}")
    if (key is None) == (references is None):
        raise ValueError(
            "one of key and references must be given, got " + ("neither" if key is None else "both")
        )
    if key is not None:
        low, high = everything.min(0), everything.max(0)
        points = low + (high - low) * np.asarray(jax.random.uniform(key, (num, size)), float)
    else:
        points = np.asarray(references, float)
        if points.shape != (num, size):
            raise ValueError(f"references must have shape {(num, size)}, got {points.shape}")
        check_no_nan("references", points)
    near = np.linalg.norm((found.truth - points) / scale, axis=-1)
    spread = np.linalg.norm((found.draws - points[:, None]) / scale, axis=-1)
    rank = ranks(near, spread)
    k = ladder(num_draws + 1)
    levels = k / (num_draws + 1)
    inside = rank[:, None] < k
    curve = curves("coverage", inside.sum(0)[None], levels, num, ["TARP"], prob)
    curve["credibility"] = ("replicate", rank / num_draws)
    # int_{1/2}^1 (1[f < z] - z) dz, of f in the middle of its step: no bias of order 1 / num_draws.
    middle = (rank + 0.5) / (num_draws + 1)
    area = np.minimum(1 - middle, 0.5) - 0.375
    curve["atc"] = ("parameter", [area.mean()])
    curve["atc_se"] = ("parameter", [area.std(ddof=1) / np.sqrt(num)])
    attrs = attributes("tarp", curve, num, num_draws, prob)
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), "tarp": curve})


__all__ = ["tarp"]
