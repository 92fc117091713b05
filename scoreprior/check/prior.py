"""Checks of a prior before it is used: density of held-out events, power spectra, strange events.

A `ScorePrior` is the law of `X + sigma_min N`: where its draws are compared with data, the same
noise is added to the data.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from scoreprior._typing import Key
from scoreprior._util import check_count, check_positive
from scoreprior.check._inputs import LEAST, as_attrs, bonferroni, check_least, check_no_nan
from scoreprior.check._two_samples import differ_in_mean
from scoreprior.check.predictive import Mahalanobis
from scoreprior.density import ScoreOnly
from scoreprior.prior import ScorePrior

if TYPE_CHECKING:
    from xarray import DataTree
else:
    DataTree = Any

CHUNK = 128
"""Events evaluated at a time."""


def held_out_bits(
    prior: ScorePrior, held_out: ArrayLike, *, key: Key, num_draws: int = 100
) -> DataTree:
    """Bits per dimension of events that training has not seen, `-log2 p(x + sigma_min n) / d`.

    Beside them those of the Gaussian with the moments of the flow, which a network has to beat, and
    those of `num_draws` draws of the prior. Were the prior right, held-out events and draws would
    be alike, and so would be their bits: `p_value` is that of a permutation test of the two means.
    Held-out events cost more bits than draws where training events were learned by heart, or where
    the prior misses a part of the data; and fewer where it spreads beyond them.

    **Arguments:** `prior`, whose density policy is used: `prior.with_density(BoundDensity(256))`
    bounds the bits from above, at the cost of 256 evaluations an event, where the exact trace takes
    one per dimension and step; `held_out` [n, *event] in data units; `key` for the noise and draws.

    **Returns** a tree with the groups `held_out` (`bits` and `gaussian` [event]) and `draws`
    (`bits` [draw]), and as attributes the means `bits`, `gaussian_bits`, `draws_bits` with their
    standard errors (`bits_se` and so on).

    Raises `ValueError` for events of another shape, fewer than ten of them, and NaN.
    """
    import xarray as xr

    x = _events("held_out", held_out, prior)
    check_count("num_draws", num_draws, least=LEAST)
    noise_key, draw_key = jax.random.split(key)
    noisy = x + prior.sigma_min * np.asarray(jax.random.normal(noise_key, x.shape, x.dtype))
    draws = np.asarray(prior.sample(draw_key, (num_draws,)))
    moments, size = prior.flow.moments, prior.flow.moments.size
    gaussian = jax.vmap(lambda x: moments.log_prob(x, prior.sigma_min))
    found = {
        "bits": _chunked(prior.log_prob, noisy),
        "gaussian_bits": _chunked(gaussian, noisy),
        "draws_bits": _chunked(prior.log_prob, draws),
    }
    bits = {name: -nats / size / np.log(2) for name, nats in found.items()}
    means = {name: float(each.mean()) for name, each in bits.items()}
    errors = {f"{name}_se": float(_standard_error(each)) for name, each in bits.items()}
    p_value = differ_in_mean(bits["bits"][:, None], bits["draws_bits"][:, None])
    attrs = as_attrs(
        check="held_out_bits", statistic="mean bits per dimension", p_value=p_value, num=len(x)
    )
    return xr.DataTree.from_dict(
        {
            "/": xr.Dataset(attrs={**attrs, **means, **errors, "sigma_min": prior.sigma_min}),
            "held_out": xr.Dataset(
                {"bits": ("event", bits["bits"]), "gaussian": ("event", bits["gaussian_bits"])}
            ),
            "draws": xr.Dataset({"bits": ("draw", bits["draws_bits"])}),
        }
    )


def spectrum(draws: ArrayLike, data: ArrayLike, *, prob: float = 0.9) -> DataTree:
    """Power spectra of images, averaged over directions: draws of a prior beside data.

    The power of one image at a frequency is the mean of `|F x|^2 / num_pixels` over a ring of
    frequencies, one `1 / num` cycles per pixel wide, `num` being the shorter side; the mean of the
    image does not count, and its edges meet. A network that misses fine structure falls off too
    soon, one that adds grain does not fall off. `p_value` is that of a permutation test of the mean
    log powers, all frequencies together.

    **Arguments:** `draws` [n, row, col] and `data` [m, row, col], independent images; data as the
    prior has them, with noise of `sigma_min`, or both converted to images; `prob`, that of the
    bands.

    **Returns** a tree with the groups `draws` and `data`: `power` [image, frequency], its `median`
    [frequency], and `lower` and `upper`, between which it lies with `prob`.

    Raises `ValueError` for shapes that are not so or disagree, fewer than ten images, NaN, and
    images with no power at some frequency.
    """
    import xarray as xr

    left, right = np.asarray(draws, float), np.asarray(data, float)
    for name, images in (("draws", left), ("data", right)):
        if images.ndim != 3 or min(images.shape[1:]) < 4:
            raise ValueError(f"{name} must be images [n, row, col], got shape {images.shape}")
        check_least(name, len(images), "images")
        check_no_nan(name, images)
    if left.shape[1:] != right.shape[1:]:
        raise ValueError(f"draws and data must be alike, got {left.shape} and {right.shape}")
    if not 0 < prob < 1:
        raise ValueError(f"prob must be between 0 and 1, got {prob}")
    frequency, powers = _radial_power(np.concatenate([left, right]))
    if (powers <= 0).any():
        raise ValueError("draws and data must have power at every frequency, got some with none")
    groups = {"draws": powers[: len(left)], "data": powers[len(left) :]}
    ends = (1 - prob) / 2, 0.5, (1 + prob) / 2
    datasets = {}
    for name, power in groups.items():
        lower, median, upper = np.quantile(power, ends, axis=0)
        datasets[name] = xr.Dataset(
            {
                "power": (("image", "frequency"), power),
                "median": ("frequency", median),
                "lower": ("frequency", lower),
                "upper": ("frequency", upper),
            },
            {"frequency": frequency},
        )
    p_value = differ_in_mean(np.log(groups["draws"]), np.log(groups["data"]))
    attrs = as_attrs(
        check="spectrum", statistic="mean log power", p_value=p_value, num=len(left), prob=prob
    )
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **datasets})


def out_of_distribution(
    prior: ScorePrior,
    events: ArrayLike,
    *,
    key: Key,
    num_draws: int = 200,
    reference: ArrayLike | None = None,
    levels: Float[Array, " level"] | None = None,
) -> DataTree:
    """Alarm: are these events, reconstructions of an observation say, strange to the prior?

    Each event, a posterior draw, is compared with draws of the prior, or with held-out data, by

    - its log density, two-sided: low for what the prior does not make, high for what is too smooth
      or too ordinary, a posterior mean for example;
    - its score norms, `log |s(x, sigma)|` at several levels, and the Mahalanobis distance of this
      vector from that of draws (Mahmood, Oliva & Styner, "Multiscale score matching for
      out-of-distribution detection", ICLR 2021, with a Gaussian in place of their auxiliary model):
      a density can be high where structure is wrong at one scale, and norms see that.

    Under a right prior and model, a posterior draw given data of that model is a draw of the prior,
    and its p-values are uniform. A learned prior is not quite the law of its data (`held_out_bits`
    says by how much): genuine data are then strange among its draws, and not among held-out data.

    **Arguments:** `prior`, whose density policy is used, and no density for `ScoreOnly()`; `events`
    [n, *event] in data units, with the noise of `sigma_min` that draws have too; `key` for
    `num_draws` draws of the prior, at least forty: half of them are the cloud that the distance is
    from, the rest are held out; `reference` [num, *event], held-out data with that noise to take in
    place of draws; `levels`, in data units, by default eight between `sigma_min` and
    the largest standard deviation of the moments.

    **Returns** a tree with the groups `score_norms` (`observed` [event, level], `simulated` [draw,
    level], `distance` and `p_value` [event]) and `log_density` (`observed` [event], `simulated`
    [draw], `p_value` [event]). Its attribute `p_value` is that of all events together (Bonferroni).

    Raises `ValueError` for events of another shape, too few draws, and NaN.
    """
    import xarray as xr

    x = _events("events", events, prior, least=1)
    check_count("num_draws", num_draws, least=4 * LEAST)
    if levels is None:
        largest = float(jnp.sqrt(prior.flow.moments.eigenvalues.max()))
        levels = jnp.geomspace(prior.sigma_min, max(largest, 2 * prior.sigma_min), 8)
    for level in np.asarray(levels):
        check_positive("levels", level)
    if reference is None:
        draws = np.asarray(prior.sample(key, (num_draws,)))
    else:
        draws = _events("reference", reference, prior, 4 * LEAST)
    norms = [_score_norms(prior, each, levels) for each in (x, draws)]
    cloud, rest = norms[1][::2], norms[1][1::2]
    distances = Mahalanobis()(np.concatenate([norms[0], rest]), cloud)
    observed, simulated = distances[: len(x)], distances[len(x) :]
    groups = {
        "score_norms": xr.Dataset(
            {
                "observed": (("event", "level"), norms[0]),
                "simulated": (("draw", "level"), norms[1]),
                "distance": ("event", observed),
                "p_value": ("event", _tail(-observed, -simulated)),
            },
            {"level": np.asarray(levels)},
        )
    }
    if not isinstance(prior.density, ScoreOnly):
        seen, drawn = _chunked(prior.log_prob, x), _chunked(prior.log_prob, draws)
        both = np.minimum(1, 2 * np.minimum(_tail(seen, drawn), _tail(-seen, -drawn)))
        groups["log_density"] = xr.Dataset(
            {"observed": ("event", seen), "simulated": ("draw", drawn), "p_value": ("event", both)}
        )
    p_values = np.concatenate([group["p_value"].values for group in groups.values()])
    attrs = as_attrs(
        check="out_of_distribution",
        statistic="Mahalanobis distance of score norms, one-sided, and log density, two-sided",
        p_value=bonferroni(p_values),
        num=len(draws),
    )
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **groups})


def _score_norms(prior: ScorePrior, events: np.ndarray, levels: Array) -> np.ndarray:
    """`log |s(x, sigma)|` [n, level]."""
    axes = tuple(range(1, events.ndim))

    def norms(x: Array) -> Array:
        each = [jnp.sqrt(jnp.sum(prior.score(x, level) ** 2, axes)) for level in levels]
        return jnp.log(jnp.stack(each, -1))

    return _chunked(norms, events)


def _radial_power(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies [k] in cycles per pixel, and powers [n, k]."""
    rows, columns = images.shape[1:]
    power = np.abs(np.fft.fft2(images, norm="ortho")) ** 2
    radius = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.fftfreq(columns)[None])
    num = min(rows, columns)
    ring = np.rint(radius * num).astype(int)
    rings = np.arange(1, num // 2 + 1)
    powers = np.stack([power[:, ring == k].mean(1) for k in rings], -1)
    return rings / num, powers


def _chunked(function: Any, events: np.ndarray) -> np.ndarray:
    """`function` of events [n, *event], some at a time, in double precision."""
    parts = np.array_split(events, max(1, -(-len(events) // CHUNK)))
    found = np.concatenate([np.asarray(function(jnp.asarray(part)), float) for part in parts])
    check_no_nan("the density or score of events", found)
    return found


def _events(name: str, events: ArrayLike, prior: ScorePrior, least: int = LEAST) -> np.ndarray:
    """Events in the precision of the prior, checked."""
    shape, found = prior.event_shape, np.asarray(events, prior.flow.moments.mean.dtype)
    if found.shape[1:] != shape or found.ndim != len(shape) + 1:
        raise ValueError(f"{name} must be [n, *{shape}], got shape {found.shape}")
    check_least(name, len(found), "events", least)
    check_no_nan(name, found)
    return found


def _standard_error(values: np.ndarray) -> float:
    return values.std(ddof=1) / np.sqrt(len(values))


def _tail(observed: np.ndarray, simulated: np.ndarray) -> np.ndarray:
    """Shares [event] of `simulated` [draw] that are as low as `observed` [event]."""
    low = (simulated[None] <= observed[:, None]).sum(1)
    return (1 + low) / (1 + len(simulated))


__all__ = ["held_out_bits", "out_of_distribution", "spectrum"]
