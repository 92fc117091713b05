"""Simulation-based calibration: ranks and coverage of posteriors over many simulated data sets.

Draw `theta_i` from the prior, data from the simulator, and `num_draws` draws from the posterior
given these data. If the posterior is right, then truth and draws are exchangeable given the data,
so that every rank is uniform. The data of a replicate may be one observation or a hundred: the
checks see only truth and draws. Draws must be independent: thin chains first.

Calibration is necessary and not sufficient: a posterior that ignores its data, and is the prior, is
calibrated. See `local_c2st` and `tarp` with references that know the data.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import ArrayLike

from scoreprior._typing import Key
from scoreprior._util import check_count
from scoreprior.check._inputs import (
    Values,
    as_attrs,
    bonferroni,
    check_prob,
    pairs,
)
from scoreprior.check._uniform import bands, ladder, ranks

if TYPE_CHECKING:
    from xarray import Dataset, DataTree
else:
    Dataset = DataTree = Any


class Replicates(NamedTuple):
    """Simulated data sets with their posteriors."""

    truth: Any  # [n, *event], or a dict of sites
    data: Any  # [n, ...]
    draws: Any  # [n, num_draws, *event], or a dict of sites


def replicate(
    prior: Callable[[Key], Any],
    simulate: Callable[[Key, Any], Any],
    infer: Callable[[Key, Any], Any],
    *,
    num: int,
    key: Key,
) -> Replicates:
    """Run `prior(key)`, `simulate(key, theta)` and `infer(key, data)` for `num` data sets.

    `infer` gives posterior draws [num_draws, *event], or a dict of them, whatever the posterior or
    engine. Calibration at many observations is the same call with a `simulate` that returns many.
    The functions are called one data set at a time, and may be any Python; of JAX functions that
    are vmapped, three lines say the same faster.

    Raises `ValueError` for results of `infer` or others whose structure or shape changes.
    """
    check_count("num", num)
    rows = []
    for each in jax.random.split(key, num):
        first, second, third = jax.random.split(each, 3)
        theta = prior(first)
        data = simulate(second, theta)
        rows.append((theta, data, infer(third, data)))
    return Replicates(*map(_stack, ("prior", "simulate", "infer"), zip(*rows, strict=True)))


def _stack(name: str, results: tuple[Any, ...]) -> Any:
    structures = [
        (jax.tree.structure(result), [np.shape(leaf) for leaf in jax.tree.leaves(result)])
        for result in results
    ]
    for index, found in enumerate(structures):
        if found != structures[0]:
            raise ValueError(
                f"{name} must give one structure and shape for all replicates, got "
                f"{structures[0]} and, of replicate {index}, {found}"
            )
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *results)


def sbc(truth: Values, draws: Values, *, prob: float = 0.95) -> DataTree:
    """Simulation-based calibration: ranks of true parameters among their posterior draws.

    Talts, Betancourt, Simpson, Vehtari & Gelman (2018), "Validating Bayesian inference algorithms
    with simulation-based calibration", Theorem 1, with the simultaneous bands of Säilynoja, Bürkner
    & Vehtari (2022, Algorithm 1) for the empirical distribution function of the ranks.

    **Arguments:** `truth` [n, *event] and `draws` [n, num_draws, *event], or dicts from sites to
    such arrays, of at least ten replicates and draws each; `prob`, of the bands. Ties of discrete
    parameters are broken at random, with a fixed key.

    **Returns** a tree with the groups `sbc`: `rank` [replicate, parameter], `ecdf` [parameter,
    level] with `lower` and `upper` [level], `p_value` [parameter]; and `prior_sbc`, normalised
    ranks in the form that ArviZ's `plot_ecdf_pit` takes. Its attribute `p_value` is that of all
    parameters (Bonferroni), and `num` and `num_draws` count.

    Raises `ValueError` for shapes or sites that disagree, too few replicates or draws, and NaN.
    """
    import xarray as xr

    check_prob("prob", prob)
    found = pairs(truth, draws)
    num, num_draws = found.draws.shape[:2]
    rank = ranks(found.truth, found.draws)
    k = ladder(num_draws + 1)
    counts = (rank[:, :, None] < k[None, None]).sum(0)
    curve = curves("ecdf", counts, k / (num_draws + 1), num, found.names, prob)
    curve["rank"] = (("replicate", "parameter"), rank)
    # Half a rank up, so that none is at an end of the unit interval.
    pit = ((rank + 0.5) / (num_draws + 1))[None]
    variables = {name: (("chain", "draw"), pit[:, :, i]) for i, name in enumerate(found.names)}
    coords = {"chain": [0], "draw": np.arange(num)}
    return xr.DataTree.from_dict(
        {
            "/": xr.Dataset(attrs=attributes("sbc", curve, num, num_draws, prob)),
            "sbc": curve,
            "prior_sbc": xr.Dataset(variables, coords),
        }
    )


def coverage(
    truth: Values,
    draws: Values,
    *,
    truth_log_prob: ArrayLike | None = None,
    draws_log_prob: ArrayLike | None = None,
    prob: float = 0.95,
) -> DataTree:
    """Expected coverage of central intervals, and of highest-density regions.

    The share of replicates whose truth is inside the credible region of level `z`, for many `z`; it
    is `z` for a posterior that is right, below for one too sure of itself. Central intervals reach
    from the k-th smallest to the k-th largest draw of a parameter, which contain an exchangeable
    truth with probability `z = 1 - 2 k / (num_draws + 1)` exactly. Highest-density regions (Hermans
    et al. 2022, "A trust crisis in simulation-based inference? Your posterior approximations can be
    unfaithful", section 2) contain the truth if fewer than `z (num_draws + 1)` draws have a higher
    density; they are those of all parameters at once.

    **Arguments:** `truth` [n, *event] and `draws` [n, num_draws, *event], or dicts of sites;
    `truth_log_prob` [n] and `draws_log_prob` [n, num_draws], both or neither: log densities of the
    posterior, nats, up to a constant of each replicate, `-inf` allowed; `prob`, of the bands.

    **Returns** a tree with the group `coverage`: `coverage` [parameter, level], its binomial
    standard error `se` [level] and the simultaneous band `lower`, `upper` [level] of a calibrated
    posterior, `p_value` [parameter], and `excess` [parameter], the mean of coverage less level,
    with `excess_se`: below zero where the posterior is too narrow. The row of highest-density
    regions is the parameter `highest density`.

    Raises `ValueError` as `sbc` does, and where one log density is given without the other.
    """
    import xarray as xr

    check_prob("prob", prob)
    found = pairs(truth, draws)
    num, num_draws = found.draws.shape[:2]
    k = ladder((num_draws + 1) / 2)[::-1]
    levels = 1 - 2 * k / (num_draws + 1)
    rank = ranks(found.truth, found.draws)
    inside = np.minimum(rank, num_draws - rank)[:, :, None] >= k[None, None]
    names = found.names
    if (truth_log_prob is None) != (draws_log_prob is None):
        raise ValueError("truth_log_prob and draws_log_prob must be given both or neither")
    if truth_log_prob is not None and draws_log_prob is not None:
        above = ranks(
            -_log_prob("truth_log_prob", truth_log_prob, (num,)),
            -_log_prob("draws_log_prob", draws_log_prob, (num, num_draws)),
        )
        region = above[:, None, None] < (num_draws + 1 - 2 * k)[None, None]
        inside, names = np.concatenate([inside, region], 1), [*names, "highest density"]
    curve = curves("coverage", inside.sum(0), levels, num, names, prob)
    excess = (inside - levels[None, None]).mean(-1)
    curve["excess"] = ("parameter", excess.mean(0))
    curve["excess_se"] = ("parameter", excess.std(0, ddof=1) / np.sqrt(num))
    return xr.DataTree.from_dict(
        {
            "/": xr.Dataset(attrs=attributes("coverage", curve, num, num_draws, prob)),
            "coverage": curve,
        }
    )


def _log_prob(name: str, values: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(values, float)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    bad = int((np.isnan(array) | (array == np.inf)).sum())
    if bad:
        raise ValueError(f"{name} must be numbers below inf, got {bad} of {array.size} not")
    return array


def curves(
    name: str, counts: np.ndarray, levels: np.ndarray, num: int, names: list[str], prob: float
) -> Dataset:
    """Curves `counts` [parameter, level] out of `num` at `levels`, with bands and p-values."""
    import xarray as xr

    null = bands(num, levels)
    lower, upper = null.limits(prob)
    return xr.Dataset(
        {
            name: (("parameter", "level"), counts / num),
            "se": ("level", np.sqrt(levels * (1 - levels) / num)),
            "lower": ("level", lower),
            "upper": ("level", upper),
            "gamma": ("parameter", null.statistic(counts)),
            "p_value": ("parameter", null.p_value(counts)),
        },
        {"parameter": names, "level": levels},
    )


def attributes(check: str, curve: Dataset, num: int, num_draws: int, prob: float) -> dict[str, Any]:
    """What a check of calibration says of itself."""
    return as_attrs(
        check=check,
        statistic="gamma, the smallest pointwise tail probability of the curve",
        p_value=bonferroni(curve["p_value"].values),
        num=num,
        num_draws=num_draws,
        prob=prob,
    )


__all__ = ["Replicates", "coverage", "replicate", "sbc"]
