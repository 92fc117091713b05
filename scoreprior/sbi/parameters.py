"""Parameters of a simulator as one real vector `z`, in which the prior is as simple as can be.

A prior is a NumPyro distribution or a NumPyro model with latent sites only. Its draws `theta` are
arrays or dicts of arrays; `z` [size] holds the sites one after another, each in coordinates of its
own. Where the site's law is a map `T` of a standard normal, `theta = T(z)` and `z ~ N(0, I)`
exactly, edges and all: a conditional law counts too, so a model of such sites has `z ~ N(0, I)`
however its sites depend on one another. Uniform sites, and maps of them, have coordinates that are
straight inside the box, and `z` is uniform with soft edges, of variance one (`sbi.SoftUniform`).
Other sites take NumPyro's bijection from real numbers to their support.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, PyTree
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import IdentityTransform, Transform
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from scoreprior._typing import Context, Event, Key, Scalar, Sigma
from scoreprior._util import size_of
from scoreprior.denoise import AbstractDenoiser, BlurredUniform, Gaussian
from scoreprior.denoise.base import AbstractWrapper
from scoreprior.gaussian import Moments
from scoreprior.sbi.laws import law_of
from scoreprior.sbi.soft import BLUR, HALF
from scoreprior.sbi.transforms import gaussianise, soften

THETA = "theta"
"""The name of the only site of a prior that is a distribution."""


class Flattened(AbstractWrapper):
    """A denoiser of events of shape `event_shape`, over their entries as one vector."""

    denoiser: AbstractDenoiser
    event_shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Event, sigma: Sigma, context: Context = None) -> Event:
        return self.denoiser(x.reshape(self.event_shape), sigma, context).ravel()

    def energy(self, x: Event, sigma: Sigma, context: Context = None) -> Scalar:
        return self.denoiser.energy(x.reshape(self.event_shape), sigma, context)


class Chart(NamedTuple):
    """Coordinates of one site: `transform` takes the site's part of `z` to its value."""

    transform: Transform
    edges: tuple[float, float] | None
    """Of the part of `z`, given the sites before: it is `U(-a, a) + b N(0, I)`, if known."""


NORMAL, BOX = (0.0, 1.0), (HALF, BLUR)


class _Walk(NamedTuple):
    """What a walk through the model at one point gives."""

    z: Float[Array, " size"]
    theta: dict[str, Array]
    log_prob: Scalar  # of z
    log_det: Scalar  # log |d theta / d z|


class Parameters(eqx.Module):
    """The vector `z` [size] of the parameters `theta` of a prior; build with `Parameters.of`.

    `names` are the latent sites in the order of `z`, `("theta",)` for a distribution, and `shapes`
    those of their parts of `z`. `law` is the denoiser of `z` under the prior, in closed form:
    `N(0, I)` where every site is a map of a normal, a box with soft edges where some are uniform
    instead, the mixture itself for a mixture of Gaussians; `None` where it is not known.
    """

    model: Callable[[], Any] = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    is_model: bool = eqx.field(static=True)
    law: AbstractDenoiser | None

    @classmethod
    def of(cls, prior: dist.Distribution | Callable[[], Any]) -> "Parameters":
        """Parameters of `prior`: a distribution without batch shape, or a model of no argument.

        Raises `TypeError` for anything else and `ValueError` for a model with an observed, discrete
        or improper site or with a plate that draws a subsample, naming it.
        """
        if isinstance(prior, dist.Distribution):
            model, is_model = _Single(prior), False
        elif callable(prior):
            # Compiled programs are kept by their model, which an object of arrays is no key for.
            model = prior if _is_hashable(prior) else functools.partial(prior)
            is_model = True
        else:
            raise TypeError(
                f"prior must be a NumPyro distribution or a model of no argument, got {prior!r}"
            )
        sites = _find(model)
        charts = {name: _chart(fn) for name, fn in sites.items()}
        shapes = {name: charts[name].transform.inverse_shape(sites[name].shape()) for name in sites}
        law = _law(sites, charts, shapes)
        return cls(model, tuple(sites), tuple(shapes[name] for name in sites), is_model, law)

    @property
    def prior(self) -> dist.Distribution | Callable[[], Any]:
        """The distribution or the model that they are parameters of."""
        return self.model.prior if isinstance(self.model, _Single) else self.model

    @property
    def size(self) -> int:
        """Number of entries of `z`."""
        return sum(map(size_of, self.shapes))

    def sample(self, key: Key) -> PyTree[Array]:
        """One draw `theta` of the prior: an array, or a dict site -> array for a model."""
        recorded = trace(seed(self.model, key)).get_trace()
        return self._out({name: recorded[name]["value"] for name in self.names})

    def to_vector(self, theta: PyTree[Array]) -> Float[Array, " size"]:
        """The vector `z` of one `theta`; entries are infinite at the edge of the support."""
        values = theta if self.is_model else {THETA: theta}
        if not isinstance(values, dict) or values.keys() != set(self.names):
            got = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"theta must be a dict with the keys {list(self.names)}, got {got}")

        def inverse(name: str, chart: Chart, shape: tuple[int, ...]) -> tuple[Array, Array]:
            value = jnp.asarray(values[name])
            if value.shape != shape:
                raise ValueError(
                    f"theta must have shape {shape} at site {name!r}, got {value.shape}"
                )
            return chart.transform.inv(value), value

        return self._walk(inverse).z

    def from_vector(self, z: Float[Array, " size"]) -> PyTree[Array]:
        """The parameters `theta` of one `z`."""
        return self._out(self._forward(z).theta)

    def log_prob(self, z: Float[Array, " size"]) -> Scalar:
        """Log density of `z` under the prior, nats."""
        return self._forward(z).log_prob

    def log_det(self, z: Float[Array, " size"]) -> Scalar:
        """`log |d theta / d z|`: the density of `theta` is that of `z` over its exponential."""
        return self._forward(z).log_det

    def _out(self, theta: dict[str, Array]) -> PyTree[Array]:
        return theta if self.is_model else theta[THETA]

    def _forward(self, z: Float[Array, " size"]) -> _Walk:
        if jnp.shape(z) != (self.size,):
            raise ValueError(f"z must have shape {(self.size,)}, got {jnp.shape(z)}")
        parts, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            parts[name] = z[start : start + size_of(shape)].reshape(shape)
            start += size_of(shape)

        def forward(name: str, chart: Chart, shape: tuple[int, ...]) -> tuple[Array, Array]:
            return parts[name], chart.transform(parts[name])

        return self._walk(forward)

    def _walk(self, visit: Callable[..., tuple[Array, Array]]) -> _Walk:
        """Run the model; `visit` gives each site's coordinates and value in its chart there.

        A site's distribution is the one given the values of the sites before it.
        """
        z, theta, log_probs, log_dets = {}, {}, {}, {}

        def value_of(site: dict[str, Any]) -> Array | None:
            if site["type"] != "sample":
                return None
            name, fn = site["name"], site["fn"]
            chart = _chart(fn)
            z[name], theta[name] = visit(name, chart, fn.shape())
            log_dets[name] = jnp.sum(chart.transform.log_abs_det_jacobian(z[name], theta[name]))
            log_probs[name] = (
                jnp.sum(jax.scipy.stats.norm.logpdf(z[name]))
                if chart.edges == NORMAL
                else jnp.sum(fn.log_prob(theta[name])) + log_dets[name]
            )
            return theta[name]

        with numpyro.handlers.block():
            substitute(self.model, substitute_fn=value_of)()
        vector = jnp.concatenate([jnp.ravel(z[name]) for name in self.names])
        totals = (jnp.sum(jnp.stack(list(each.values()))) for each in (log_probs, log_dets))
        return _Walk(vector, theta, *totals)


@eqx.filter_jit
def from_vectors(parameters: Parameters, z: Float[Array, "num size"]) -> PyTree[Array]:
    """The parameters `theta` [num, ...] of many `z`, in one compiled program."""
    return jax.vmap(parameters.from_vector)(z)


class _Single:
    """The model with one site, `theta`."""

    def __init__(self, prior: dist.Distribution):
        if prior.batch_shape:
            raise ValueError(
                f"prior must have no batch shape, got {prior.batch_shape}: make it an event with "
                f"prior.to_event({len(prior.batch_shape)})"
            )
        self.prior = prior

    def __call__(self) -> Array:
        return numpyro.sample(THETA, self.prior)


def _find(model: Callable[[], Any]) -> dict[str, dist.Distribution]:
    """The distributions of the latent sites, at one draw."""
    recorded = trace(_Refuse(seed(model, jax.random.key(0)))).get_trace()
    sites = {name: site["fn"] for name, site in recorded.items() if site["type"] == "sample"}
    if not sites:
        raise ValueError("prior must have a latent site, got a model with none")
    return sites


class _Refuse(Messenger):
    """Raises at the sites that no prior may have, before they are drawn."""

    def process_message(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if msg["type"] == "plate" and msg["value"] is None:
            raise ValueError(f"prior must draw no subsample, got plate {name!r}")
        if msg["type"] != "sample":
            return
        kind = type(msg["fn"]).__name__
        if msg["is_observed"]:
            raise ValueError(
                f"prior must have latent sites only, got the observed site {name!r}: leave the "
                "likelihood to the simulator"
            )
        if isinstance(msg["fn"], dist.ImproperUniform):
            raise ValueError(f"prior must be proper, got the improper site {name!r}")
        if msg["fn"].support is None or msg["fn"].support.is_discrete:
            raise ValueError(
                f"prior must be continuous, got the discrete site {name!r} ({kind}): draw it in "
                "the simulator"
            )


def _chart(fn: dist.Distribution) -> Chart:
    if (transform := soften(fn)) is not None:
        return Chart(transform, BOX)
    if (transform := gaussianise(fn)) is not None:
        return Chart(transform, NORMAL)
    if _is_real(fn.support):
        return Chart(IdentityTransform(), None)
    return Chart(biject_to(fn.support), None)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector, constraints.real_matrix)


def _law(
    sites: dict[str, dist.Distribution],
    charts: dict[str, Chart],
    shapes: dict[str, tuple[int, ...]],
) -> AbstractDenoiser | None:
    """The denoiser of `z`, where it is known."""
    edges = [chart.edges for chart in charts.values()]
    if None not in edges:
        sizes = [size_of(shapes[name]) for name in charts]
        half, blur = jnp.asarray(np.repeat(np.array(edges), sizes, axis=0).T)
        if set(edges) == {NORMAL}:
            return Gaussian(Moments(half, blur))
        return BlurredUniform(-half, half, blur)
    (name, fn), *others = sites.items()
    if others or fn.batch_shape or not isinstance(charts[name].transform, IdentityTransform):
        return None
    try:
        law = law_of(fn)
    except ValueError:
        return None
    return law if len(shapes[name]) == 1 else Flattened(law, shapes[name])
