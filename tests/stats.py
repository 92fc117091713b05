"""Statistical assertions, each gated at five standard errors of its own estimate.

A gate passes while `|estimate - truth| <= 5 se`. A correct program meets a fixed key once, so a
failure is a fault and not bad luck (one in two million per component). A gate too wide to see
anything is a fault too: `require_power` is part of every assertion here and fails unless a bias of
`bias` times the natural scale of the quantity would be caught with probability 0.977, that is
unless

    (5 + 2) se <= bias * scale.

`bias` is 0.05 everywhere by default: about 20,000 independent draws for a mean, 40,000 for a
covariance, 5,000 for a probability near one half. A test that cannot afford them says so by name,
`bias=0.2`, where the reader sees it.

Draws are `[n, *event]`, chains `[num_chains, n, *event]`.
"""

import numpy as np
from numpyro.diagnostics import effective_sample_size

GATE = 5.0
POWER = 2.0


def require_power(se, scale, *, bias=0.05):
    """Fail unless a bias of `bias * scale` stands clear of a gate of five standard errors `se`."""
    se, scale = np.broadcast_arrays(np.asarray(se, float), np.asarray(scale, float))
    widest = (GATE + POWER) * se
    blind = ~(widest <= bias * scale)
    assert not blind.any(), (
        f"no power: {blind.sum()} of {se.size} gates cannot see {bias:g} times the scale; "
        f"standard error {se[blind].max():.3g} against scale {scale[blind].min():.3g}: "
        f"take {np.max((widest[blind] / (bias * scale[blind])) ** 2):.3g} times the draws "
        "or name a larger bias"
    )


def chain_ess(chains):
    """Effective number of independent draws in chains `[num_chains, n, *event]`, per component."""
    chains = np.asarray(chains, float)
    return np.broadcast_to(effective_sample_size(chains), chains.shape[2:])


def assert_mean(draws, truth, *, ess=None, bias=0.05):
    """The mean of `draws` is `truth`, component by component; `bias` is in standard deviations.

    `ess` is the effective number of draws, one number or one per component, `n` when `None`.
    """
    series = _rows(draws)
    _gate(series.mean(0), truth, _standard_error(series, ess), series.std(0), bias, "mean")


def assert_cov(draws, truth, *, ess=None, bias=0.05):
    """The covariance of `draws` is `truth`, `[size, size]`; `bias` is in `sqrt(C_ii C_jj)`.

    The standard error of each entry is that of a mean of products, so no law is assumed.
    """
    rows = _rows(draws)
    products, scale = _products(rows)
    if ess is not None:
        sizes = np.broadcast_to(np.asarray(ess, float).reshape(-1), rows.shape[1])
        ess = np.minimum.outer(sizes, sizes).reshape(-1)
    _gate(products.mean(0), truth, _standard_error(products, ess), scale, bias, "covariance")


def assert_mean_of_chains(chains, truth, *, bias=0.05):
    """As `assert_mean`, with the effective sample size of each component."""
    chains = np.asarray(chains, float)
    assert_mean(chains.reshape(-1, *chains.shape[2:]), truth, ess=chain_ess(chains), bias=bias)


def assert_cov_of_chains(chains, truth, *, bias=0.05):
    """As `assert_cov`, with the effective sample size of each product of components."""
    chains = np.asarray(chains, float)
    products, scale = _products(_rows(chains.reshape(-1, *chains.shape[2:])))
    ess = chain_ess(products.reshape(*chains.shape[:2], -1))
    _gate(products.mean(0), truth, _standard_error(products, ess), scale, bias, "covariance")


def assert_mean_of_groups(values, groups, truth, *, scale=None, bias=0.05):
    """The mean of `values` [n, *event] is `truth`, with the standard error of independent groups.

    `groups` [n] are labels. Draws of one group may depend on one another in any way, and groups may
    have different numbers of draws: the estimate is the ratio of two sums over groups. `bias` is in
    units of `scale`, the standard deviation of `values` when `None`.
    """
    rows, groups = _rows(values), np.asarray(groups)
    labels, index = np.unique(groups, return_inverse=True)
    mean = rows.mean(0)
    sums = np.zeros((len(labels), rows.shape[1]))
    np.add.at(sums, index, (rows - mean) / len(rows))
    se = np.sqrt((sums**2).sum(0) * len(labels) / (len(labels) - 1))
    _gate(mean, truth, se, rows.std(0) if scale is None else scale, bias, "mean of groups")


def assert_proportion(hits, n, p, *, bias=0.05):
    """`hits` out of `n` (effective) trials agree with probability `p`; `bias` is in probability."""
    p = np.asarray(p, float)
    _gate(np.asarray(hits) / n, p, np.sqrt(p * (1 - p) / n), 1.0, bias, "proportion")


def assert_masses(memberships, weights, *, ess=None, bias=0.05):
    """Draws fall to components with probabilities `weights`; `bias` is in probability.

    `memberships` are labels `[n]` or responsibilities `[n, num_components]`, whose variance is at
    most that of labels, which is the one used.
    """
    weights = np.asarray(weights, float)
    memberships = np.asarray(memberships)
    if memberships.ndim == 1:
        memberships = np.eye(len(weights))[memberships]
    se = np.sqrt(weights * (1 - weights) / (len(memberships) if ess is None else ess))
    _gate(memberships.mean(0), weights, se, 1.0, bias, "mass")


def assert_same_mean(a, b, *, ess_a=None, ess_b=None, bias=0.05):
    """Two independent sets of draws have one mean; `bias` is in pooled standard deviations."""
    a, b = _rows(a), _rows(b)
    se = np.hypot(_standard_error(a, ess_a), _standard_error(b, ess_b))
    scale = np.sqrt((a.var(0) + b.var(0)) / 2)
    _gate(a.mean(0), b.mean(0), se, scale, bias, "difference of means")


def _rows(draws):
    draws = np.asarray(draws, float)
    return draws.reshape(len(draws), -1)


def _products(rows):
    """Centred products `[n, size * size]`, unbiased for the covariance, and the scale of each."""
    centred = (rows - rows.mean(0)) * np.sqrt(len(rows) / (len(rows) - 1))
    products = centred[:, :, None] * centred[:, None, :]
    sd = centred.std(0)
    return products.reshape(len(rows), -1), np.outer(sd, sd).reshape(-1)


def _standard_error(series, ess):
    ess = len(series) if ess is None else np.asarray(ess, float).reshape(-1)
    sd = series.std(0)
    return np.where(sd > 0, sd, 0.0) / np.sqrt(np.where(sd > 0, ess, 1.0))


def _gate(estimate, truth, se, scale, bias, name):
    estimate = np.asarray(estimate, float).reshape(-1)
    truth = np.broadcast_to(np.asarray(truth, float).reshape(-1), estimate.shape)
    se = np.broadcast_to(se, estimate.shape)
    rounding = 1e-12 * (1 + np.abs(truth))
    error = np.abs(estimate - truth)
    outside = ~(error <= GATE * se + rounding)
    worst = np.argmax(np.where(outside, error / (se + rounding), -1.0))
    assert not outside.any(), (
        f"{name}: {outside.sum()} of {outside.size} outside {GATE:g} standard errors; component "
        f"{worst} is {estimate[worst]:.6g}, should be {truth[worst]:.6g}, se {se[worst]:.3g}"
    )
    require_power(se, scale, bias=bias)
