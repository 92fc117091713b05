"""The prior in variational inference: losses and gradients by hand, closed forms, learned nets."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, autoguide
from numpyro.infer import initialization as init
from numpyro.infer.reparam import NeuTraReparam
from numpyro.infer.util import initialize_model, log_density, potential_energy
from numpyro.optim import Adam

from laws import close
from priors import PRIORS, draws, gradient, log_prob
from scoreprior.denoise import Gaussian
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.prior import ScorePrior

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(0)


@pytest.fixture(params=PRIORS)
def prior(request):
    return PRIORS[request.param]


def model(prior, y):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(x.ndim), obs=y)


def log_joint(prior, x, y):
    return log_prob(prior, x) + dist.Normal(x, 0.5).log_prob(y).sum()


GUIDES = {
    "delta": autoguide.AutoDelta,
    "normal": autoguide.AutoNormal,
    "multivariate": autoguide.AutoMultivariateNormal,
    "low rank": autoguide.AutoLowRankMultivariateNormal,
    "iaf": lambda model, **kw: autoguide.AutoIAFNormal(model, num_flows=1, **kw),
    "bnaf": lambda model, **kw: autoguide.AutoBNAFNormal(model, num_flows=1, **kw),
    "laplace": autoguide.AutoLaplaceApproximation,
}


def start(model, make_guide, prior, y):
    """A guide around `y / 2` and its initial parameters."""
    guide = make_guide(model, init_loc_fn=init.init_to_value(values={"x": 0.5 * y}))
    svi = SVI(model, guide, Adam(1e-2), Trace_ELBO())
    return guide, svi.get_params(svi.init(KEY, prior, y))


def loss_and_slope(model, guide, params, prior, y):
    loss = lambda params: Trace_ELBO().loss(KEY, params, model, guide, prior, y)
    return jax.jit(jax.value_and_grad(loss))(params)


def draw_of(guide, params, prior, y):
    """The draw that the loss takes from the guide, with its log density."""
    _, key = jax.random.split(KEY)
    total, trace = log_density(handlers.seed(guide, key), (prior, y), {}, params)
    return trace["x"]["value"], total


@pytest.mark.parametrize("name", GUIDES)
def test_loss_and_gradient_of_every_guide(prior, name):
    """`log q(x) - log p(x, y)` at the guide's own draw, and its pathwise derivative by hand."""
    y = draws(prior, 1, seed=1)[0]
    guide, params = start(model, GUIDES[name], prior, y)
    loss, slope = loss_and_slope(model, guide, params, prior, y)
    (x, log_q), pull = jax.vjp(jax.jit(lambda params: draw_of(guide, params, prior, y)), params)
    close(loss, log_q - log_joint(prior, x, y), 1e-8)
    downhill = -gradient(prior, x) - (y - x) / 0.25
    (expected,) = pull((downhill, jnp.ones_like(log_q)))
    jax.tree.map(lambda a, b: close(a, b, 1e-7, 1e-8), slope, expected)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slope)) > 1e-2
    if name in ("delta", "laplace"):
        close(x, 0.5 * y)
    else:
        assert not np.any(np.isclose(x, 0.5 * y))


def twin(prior, y):
    """The same model with the prior as a bare factor: nothing of it is a distribution."""
    axes = len(prior.event_shape)
    support = dist.constraints.independent(dist.constraints.real, axes)
    x = numpyro.sample("x", dist.ImproperUniform(support, (), prior.event_shape))
    numpyro.factor("log_prob_of_x", log_prob(prior, x))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(axes), obs=y)


def test_annealed_importance_guide():
    """Its steps follow the gradient of the model: equal to those on the twin model."""
    prior = PRIORS["exact"]
    y = draws(prior, 1, seed=1)[0]
    make = lambda model, **kw: autoguide.AutoDAIS(model, K=2, **kw)
    guide, params = start(model, make, prior, y)
    loss, slope = loss_and_slope(model, guide, params, prior, y)
    expected, expected_slope = loss_and_slope(
        twin, start(twin, make, prior, y)[0], params, prior, y
    )
    close(loss, expected, 1e-8)
    jax.tree.map(lambda a, b: close(a, b, 1e-7, 1e-8), slope, expected_slope)
    assert float(jnp.abs(slope["auto_eta0"])) > 1e-2


def test_svi_descends(prior):
    """A few steps of optimisation lower the loss from that of the start."""
    y = draws(prior, 1, seed=1)[0]
    guide = autoguide.AutoDelta(model, init_loc_fn=init.init_to_value(values={"x": y + 1.0}))
    result = SVI(model, guide, Adam(0.1), Trace_ELBO()).run(KEY, 30, prior, y, progress_bar=False)
    close(result.losses[0], -log_joint(prior, y + 1.0, y))
    at_end = -log_joint(prior, result.params["x_auto_loc"], y)
    assert at_end < result.losses[0]
    close(guide.median(result.params)["x"], result.params["x_auto_loc"])


def test_laplace_precision_is_the_hessian(prior):
    """Against central differences of the gradient of the joint."""
    y = draws(prior, 1, seed=1)[0]
    guide, params = start(model, GUIDES["laplace"], prior, y)
    tril = jax.jit(lambda params: guide.get_transform(params).scale_tril)(params)
    x, step = 0.5 * y, 1e-5
    rows = [
        (gradient(prior, x - step * e) - gradient(prior, x + step * e)).ravel() / (2 * step)
        for e in jnp.eye(y.size).reshape(-1, *y.shape)
    ]
    close(jnp.linalg.inv(tril @ tril.T), jnp.stack(rows) + jnp.eye(y.size) / 0.25, 1e-6, 1e-6)


def test_neutra(prior):
    """The potential of the warped model is the joint at the warped point plus the log-Jacobian."""
    y = draws(prior, 1, seed=1)[0]
    guide, params = start(model, GUIDES["iaf"], prior, y)
    neutra = NeuTraReparam(guide, params)
    warped = neutra.reparam(model)
    z = jax.random.normal(KEY, (y.size,))

    def energy(z):
        return potential_energy(warped, (prior, y), {}, {"auto_shared_latent": z})

    transform = guide.get_transform(params)
    x, pull = jax.vjp(lambda z: transform(z).reshape(y.shape), z)
    close(neutra.transform_sample(z)["x"], x)
    log_det = lambda z: jnp.linalg.slogdet(jax.jacfwd(transform)(z))[1]
    value, slope = jax.jit(jax.value_and_grad(energy))(z)
    close(value, -log_joint(prior, x, y) - log_det(z), 1e-8)
    downhill = pull(-gradient(prior, x) - (y - x) / 0.25)[0]
    close(slope, downhill - jax.jit(jax.grad(log_det))(z), 1e-7, 1e-8)


# Initialisation


def site_of(prior):
    trace = handlers.trace(handlers.seed(lambda: numpyro.sample("x", prior), KEY)).get_trace()
    return {**trace["x"], "value": None, "kwargs": {"rng_key": KEY, "sample_shape": ()}}


STRATEGIES = {
    "sample": (init.init_to_sample, lambda prior: prior.sample(KEY)),
    "median": (init.init_to_median, lambda prior: jnp.median(prior.sample(KEY, (15,)), 0)),
    "mean": (init.init_to_mean, lambda prior: jnp.median(prior.sample(KEY, (15,)), 0)),
    "uniform": (
        init.init_to_uniform,
        lambda prior: dist.Uniform(-2, 2).sample(KEY, prior.event_shape),
    ),
    "feasible": (init.init_to_feasible, lambda prior: jnp.zeros(prior.event_shape)),
    "value": (
        init.init_to_value(values={"x": jnp.float64(0.25)}),
        lambda prior: jnp.float64(0.25),
    ),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_init_strategies(prior, name):
    strategy, expected = STRATEGIES[name]
    close(strategy(site_of(prior)), expected(prior))


@pytest.mark.parametrize("name", STRATEGIES)
def test_initialised_models_hold_the_energy_of_their_start(prior, name):
    strategy, _ = STRATEGIES[name]
    if name == "value":
        strategy = init.init_to_value(values={"x": jnp.full(prior.event_shape, 0.25)})
    y = draws(prior, 1, seed=1)[0]
    found = initialize_model(KEY, model, init_strategy=strategy, model_args=(prior, y)).param_info
    x = found.z["x"]
    close(found.potential_energy, -log_joint(prior, x, y), 1e-8)
    close(found.z_grad["x"], -gradient(prior, x) - (y - x) / 0.25, 1e-7, 1e-8)


# Gaussian models, where the answer is known


def gaussian_prior(covariance):
    law = Gaussian(Moments.dense(jnp.array([0.5, -1.0]), jnp.asarray(covariance)))
    noisy = Gaussian(Moments.dense(law.law.mean, law.law.covariance() + 0.01 * jnp.eye(2)))
    return ScorePrior(Flow(law, law.law, sigma_min=0.1, solver=FixedGrid(1))), noisy


def gaussian_model(prior, y):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def test_laplace_is_the_gaussian_posterior():
    prior, noisy = gaussian_prior([[1.0, 0.6], [0.6, 0.8]])
    y = jnp.array([1.5, 0.2])
    guide = autoguide.AutoLaplaceApproximation(gaussian_model)
    svi = SVI(gaussian_model, guide, Adam(0.1), Trace_ELBO())
    params = svi.run(KEY, 600, prior, y, progress_bar=False).params
    truth = noisy.posterior(jnp.eye(2), y, 0.25 * jnp.eye(2)).law
    posterior = guide.get_posterior(params)
    close(posterior.mean, truth.mean, 1e-4)
    close(posterior.covariance_matrix, truth.covariance(), 1e-8)


def test_mean_field_is_exact_for_independent_gaussians():
    prior, noisy = gaussian_prior([[1.0, 0.0], [0.0, 0.3]])
    y = jnp.array([1.5, 0.2])
    truth = noisy.posterior(jnp.eye(2), y, 0.25 * jnp.eye(2)).law
    sd = jnp.sqrt(jnp.diag(truth.covariance()))
    at_truth = {"x_auto_loc": truth.mean, "x_auto_scale": sd}
    guide, _ = start(gaussian_model, autoguide.AutoNormal, prior, y)
    loss = lambda key: Trace_ELBO().loss(key, at_truth, gaussian_model, guide, prior, y)
    # At the posterior every draw gives the evidence.
    evidence = noisy.log_evidence(jnp.eye(2), y, 0.25 * jnp.eye(2))
    close(jax.jit(jax.vmap(loss))(jax.random.split(KEY, 5)), jnp.full(5, -evidence))
    # And the optimiser gets there.
    guide = autoguide.AutoNormal(
        gaussian_model, init_loc_fn=init.init_to_value(values={"x": y - 2})
    )
    optimiser = Adam(lambda step: 0.1 / (1 + step / 50))
    svi = SVI(gaussian_model, guide, optimiser, Trace_ELBO(num_particles=32))
    params = svi.run(KEY, 600, prior, y, progress_bar=False).params
    np.testing.assert_allclose((params["x_auto_loc"] - truth.mean) / sd, jnp.zeros(2), atol=0.1)
    np.testing.assert_allclose(params["x_auto_scale"], sd, rtol=0.1)
