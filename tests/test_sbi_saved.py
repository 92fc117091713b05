"""Saved posteriors come back bit for bit, with the prior and the embedding that they had."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreprior as sp
from scoreprior.sbi import NPSE, TSNPSE, JointNPSE, JointPosterior, Posterior, SetEncoder
from scoreprior.sbi.conditional import BoxRegression

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(5)
TRAINING = {"num_steps": 3, "batch_size": 16, "peak": 0.05, "progress": False}
ALONE = TRAINING | {"surrogate": None}
SMALL = {"width": 8, "num_blocks": 1}
X_O = jnp.array([0.5, -0.2])


def prior(spread=0.5):
    """A positive number, and one that depends on it; `z` is their standard normals."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, spread))
    numpyro.sample("mean", dist.Normal(1.0, scale).expand([2]).to_event(1))


def simulations(shape=(2,), num=60):
    draw, noise = jax.random.split(KEY)
    scale = jnp.exp(0.5 * jax.random.normal(draw, (num,)))
    mean = 1 + scale[:, None] * jax.random.normal(noise, (num, 2))
    spread = jax.random.normal(jax.random.fold_in(KEY, 1), (num, *shape))
    return {"scale": scale, "mean": mean}, spread + mean.reshape(num, *[1] * (len(shape) - 1), 2)


class Mine(eqx.Module):
    """An embedding of the user's: arrays, a function, and a setting."""

    layer: eqx.nn.Linear
    function: object
    power: float = 1.0

    def __init__(self, key, size=3, function=jnp.tanh, power=1.0):
        self.layer, self.function, self.power = eqx.nn.Linear(2, size, key=key), function, power

    def __call__(self, x):
        return self.function(self.layer(x)) ** self.power


def trained(embedding=None, shape=(2,), drop=0.0):
    """With all of its weights moved, whether or not so little training was worth keeping."""
    posterior = NPSE(prior, simulations(shape), embedding=embedding, drop=drop, **SMALL).fit(
        key=KEY, **ALONE
    )
    weights, rest = eqx.partition(posterior.denoiser.net, eqx.is_inexact_array)
    moved = eqx.combine(jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(leaf), weights), rest)
    return eqx.tree_at(lambda p: p.denoiser.net, posterior, moved)


def same(again, saved, context):
    """All arrays and settings, and what the denoiser says, to the last bit."""
    names = ("denoiser", "standardise", "moments", "sigma_min", "sigma_max")
    for name in (*names, *(["max_items", "can_drop", "solver"] * hasattr(saved, "solver"))):
        assert eqx.tree_equal(getattr(again, name), getattr(saved, name)), name
    for ours, its in zip(again.history, saved.history, strict=True):
        np.testing.assert_array_equal(ours, its)
        assert ours.dtype == its.dtype
    z = jnp.full(saved.moments.mean.shape, 0.7)
    said = [p.denoiser(z, jnp.asarray(0.4), context) for p in (again, saved)]
    assert jnp.isfinite(said[0]).all()
    np.testing.assert_array_equal(*said)


def same_laws(again, saved, observed):
    """Draws of `z` and of `theta`, and log densities."""
    laws = [p.condition(observed) for p in (again, saved)]
    draws = [law.sample(KEY, (5,)) for law in laws]
    np.testing.assert_array_equal(*draws)
    np.testing.assert_array_equal(*[law.log_prob(draws[0]) for law in laws])
    thetas = [jax.vmap(p.parameters.from_vector)(draws[0][:, :3]) for p in (again, saved)]
    jax.tree.map(np.testing.assert_array_equal, *thetas)


def test_a_posterior_comes_back_bit_for_bit_and_knows_the_prior(tmp_path):
    posterior = trained(drop=0.3)
    assert jnp.abs(posterior.denoiser.net.null).max() > 0
    posterior.save(tmp_path / "posterior")
    again = Posterior.load(tmp_path / "posterior", prior)
    same(again, posterior, posterior.context(X_O))
    same(again, posterior, posterior.context(X_O)._replace(known=jnp.asarray(False)))
    same_laws(again, posterior, X_O)


def test_a_posterior_with_the_regression_of_a_box_comes_back(tmp_path):
    theta = jax.random.uniform(KEY, (400, 2), minval=-1)
    x = theta + 0.3 * jax.random.normal(jax.random.fold_in(KEY, 1), theta.shape)
    box = dist.Uniform(-jnp.ones(2), 1.0).to_event(1)
    posterior = NPSE(box, (theta, x), **SMALL).fit(key=KEY, **ALONE)
    assert isinstance(posterior.denoiser.regression, BoxRegression)
    posterior.save(tmp_path / "posterior")
    again = Posterior.load(tmp_path / "posterior", box)
    same(again, posterior, posterior.context(X_O))
    with pytest.raises(ValueError, match="prior must be that of training"):
        Posterior.load(tmp_path / "posterior", dist.Uniform(-jnp.ones(2), 1.1).to_event(1))


def test_posteriors_of_sets_come_back_with_their_encoder(tmp_path):
    encoder = SetEncoder((2,), 5, width=6, depth=1, key=KEY)
    posterior = trained(encoder, (4, 2))
    posterior.save(tmp_path / "posterior")
    context = posterior.context(jnp.ones((3, 2)) * X_O)
    same(Posterior.load(tmp_path / "posterior", prior), posterior, context)


def test_an_embedding_of_the_users_is_filled_with_the_weights_of_training(tmp_path):
    posterior = trained(Mine(KEY))
    posterior.save(tmp_path / "posterior")
    other = Mine(jax.random.key(99))
    again = Posterior.load(tmp_path / "posterior", prior, embedding=other)
    same(again, posterior, posterior.context(X_O))
    assert not eqx.tree_equal(again.denoiser.net.embedding, other)


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (None, "embedding must be given: the posterior was trained with 'Mine'"),
        (Mine(KEY, size=4), r"embedding must have the arrays .*\(3, 2\).* got .*\(4, 2\)"),
        (lambda x: x, "embedding must have the arrays"),
        (Mine(KEY, function=jax.nn.relu), "embedding must be that of training, 'Mine', got one"),
        (Mine(KEY, power=2.0), "embedding must be that of training"),
        (Mine(KEY, function=jnp.log, power=0.5), "embedding must be that of training"),  # NaN
    ],
)
def test_another_embedding_is_refused(tmp_path, as_user, embedding, message):
    trained(Mine(KEY)).save(tmp_path / "posterior")
    with pytest.raises(ValueError, match=message) as caught:
        Posterior.load(tmp_path / "posterior", prior, embedding=embedding)
    assert str(tmp_path / "posterior") in str(caught.value)


def fewer():
    numpyro.sample("scale", dist.LogNormal(0.0, 0.5))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: prior(0.502), "prior must be that of training, which at z = .* has theta = "),
        (fewer, r"with sites \('scale', 'mean'\) of shapes \(\(\), \(2,\)\), got \('scale',\)"),
        (dist.Normal(jnp.zeros(3), 1.0).to_event(1), r"got \('theta',\) of shapes \(\(3,\),\)"),
    ],
)
def test_another_prior_is_refused(tmp_path, other, message):
    trained().save(tmp_path / "posterior")
    with pytest.raises(ValueError, match=message):
        Posterior.load(tmp_path / "posterior", other)


def test_priors_of_the_same_coordinates_differ_by_their_density(tmp_path):
    """Of a mixture `z` is `theta` whatever the weights."""

    def mixture(weight):
        parts = dist.Normal(jnp.array([-1.0, 1.0]), 0.5)
        return dist.MixtureSameFamily(dist.Categorical(jnp.array([weight, 1 - weight])), parts)

    theta, x = simulations()
    settings = SMALL | {"width": 4}
    posterior = NPSE(mixture(0.5), (theta["scale"], x), **settings).fit(key=KEY, **ALONE)
    posterior.save(tmp_path / "posterior")
    Posterior.load(tmp_path / "posterior", mixture(0.5))
    with pytest.raises(ValueError, match="prior must be that of training"):
        Posterior.load(tmp_path / "posterior", mixture(0.4))


def test_a_joint_posterior_comes_back_bit_for_bit(tmp_path):
    joint = JointNPSE(prior, simulations(), **SMALL).fit(key=KEY, **TRAINING)
    joint.save(tmp_path / "joint")
    again = JointPosterior.load(tmp_path / "joint", prior)
    same(again, joint, joint.context({"x": X_O}))
    same_laws(again, joint, {"x": X_O})
    with pytest.warns(UserWarning, match="x lies outside the range .* in 1 of 2 features"):
        again.context({"x": X_O.at[0].set(1e3)})
    with pytest.warns(UserWarning, match="scale lies outside the range .* in 1 of 1 features"):
        again.context({"scale": 1e3})
    before = eqx.tree_at(lambda p: p.range_z, joint, None)
    before.save(tmp_path / "before")
    older = JointPosterior.load(tmp_path / "before", prior)
    assert older.range_z is None
    older.context({"scale": 1e3})
    with pytest.raises(ValueError, match=r"not the config of a posterior saved by sbi\.Posterior"):
        Posterior.load(tmp_path / "joint", prior)


def test_the_posterior_of_sequential_rounds_comes_back(tmp_path):
    law = dist.Normal(0.0, 1.0)
    run = TSNPSE(
        law,
        lambda key, theta: theta[None] + 0.3 * jax.random.normal(key, (1,)),
        40,
        1,
        settings=SMALL,
        training=TRAINING,
    )
    posterior = run.fit(jnp.array([0.2]), key=KEY).posterior
    posterior.save(tmp_path / "posterior")
    context = posterior.context(jnp.array([0.2]))
    same(Posterior.load(tmp_path / "posterior", law), posterior, context)


def test_files_that_are_no_posterior_say_so(tmp_path):
    path = tmp_path / "posterior"
    with pytest.raises(FileNotFoundError, match="is no folder: give the folder of a saved post"):
        Posterior.load(path, prior)
    posterior = trained()
    posterior.save(path)
    posterior.save(path)  # in its own place
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="safetensors was altered"):
        Posterior.load(path, prior)
    law = sp.denoise.Gaussian(sp.Moments(jnp.zeros(2), jnp.ones(2)))
    flow = sp.Flow(law, law.moments(), sigma_min=0.1, sigma_max=10.0)
    sp.save(tmp_path / "prior", sp.ScorePrior(flow))
    with pytest.raises(ValueError, match=r"not the config of a posterior saved by sbi\.Posterior"):
        Posterior.load(tmp_path / "prior", prior)
    with pytest.raises(FileExistsError, match="exists and is not a saved posterior"):
        posterior.save(tmp_path / "prior")
    with pytest.raises(TypeError, match="denoiser must be that of NPSE.fit to be saved, got Gaus"):
        eqx.tree_at(lambda p: p.denoiser, posterior, law).save(tmp_path / "other")
    assert not (tmp_path / "other").exists()
