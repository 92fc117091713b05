"""`Problem.with_data`: programs compiled once, run on the data of each problem."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from priors import PRIORS
from scoreprior._run import Draws
from scoreprior.infer import infer
from scoreprior.problem import Problem

pytestmark = pytest.mark.promotes_ranks

PRIOR = PRIORS["exact"]
TRACES = []
Y = np.array([[0.5, -1.0], [2.0, 0.3], [-0.4, 1.2]])


def model(y, *, scale, count=1):
    TRACES.append("model")
    noise = numpyro.sample("noise", dist.LogNormal(-0.5, 0.3))
    weight = numpyro.param("weight", scale)
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(weight * x, count * noise).to_event(1), obs=y)


FIRST = Problem.from_model(model, Y[0], scale=jnp.array(1.0))
POSITION = {"noise": jnp.array(0.1), "x": jnp.array([0.2, -0.6])}


@eqx.filter_jit
def log_density(problem, position):
    TRACES.append("log_density")
    return problem.log_density(position)


@pytest.mark.parametrize("centred", [False, True])
def test_a_second_problem_runs_the_compiled_program_on_its_own_data(centred):
    parent = FIRST.centred() if centred else FIRST
    for number, (y, scale) in enumerate(zip(Y, (1.0, 1.5, 0.5), strict=True)):
        problem = parent.with_data(y, scale=jnp.array(scale))
        TRACES.clear()
        found = log_density(problem, POSITION)
        assert ("log_density" in TRACES) == (number == 0)
        fresh = Problem.from_model(model, y, scale=jnp.array(scale))
        fresh = fresh.centred() if centred else fresh
        np.testing.assert_allclose(found, fresh.log_density(POSITION), rtol=1e-12)


def test_other_shapes_settings_and_forms_get_programs_of_their_own():
    problem = FIRST.with_data(Y[0], scale=jnp.array(1.0))
    log_density(problem, POSITION)
    others = [
        FIRST.with_data(Y[0], scale=jnp.array(1.0), count=2),
        FIRST.with_data(Y[:1, 0], scale=jnp.array(1.0)),
        problem.centred(),
    ]
    for other in others:
        TRACES.clear()
        found = log_density(other, POSITION)
        assert "log_density" in TRACES
        np.testing.assert_allclose(found, other.log_density(POSITION), rtol=1e-12)


def test_unrelated_problems_share_nothing():
    """A model may read globals that have changed since: only `with_data` promises they have not."""
    for problem in (FIRST, Problem.from_model(model, Y[0], scale=jnp.array(1.0))):
        TRACES.clear()
        log_density(problem, POSITION)
        assert "log_density" in TRACES


class Gradients:
    """An engine that returns the gradient of the log density at two prior draws."""

    def run(self, problem, key, *, progress, checkpoint):
        del progress, checkpoint
        positions, stats = jax.tree.map(np.asarray, gradients(problem, key))
        return Draws(problem, positions, stats, False)


@eqx.filter_jit
def gradients(problem, key):
    positions = jax.vmap(problem.initial)(jax.random.split(key, 2))
    found = jax.vmap(jax.grad(problem.log_density))(positions)
    return jax.tree.map(lambda leaf: leaf[None], (found, {"lp": found["noise"]}))


def test_infer_takes_a_problem_and_runs_its_programs_on_new_data():
    def run(of, y):
        options = {"key": jax.random.key(0), "posterior_predictive": True}
        return infer(of, Gradients(), y, scale=jnp.array(1.0), **options)

    run(FIRST, Y[0])
    TRACES.clear()
    tree = run(FIRST, Y[1])
    during = len(TRACES)
    FIRST.with_data(Y[1], scale=jnp.array(1.0))
    assert during == len(TRACES) - during, "only the checks of the data may trace the model"
    expected = run(model, Y[1])
    np.testing.assert_array_equal(tree.observed_data["y"], Y[1])
    np.testing.assert_allclose(tree.posterior["x"], expected.posterior["x"], rtol=1e-8)
    assert not np.allclose(tree.posterior["x"], run(FIRST, Y[2]).posterior["x"])


def test_infer_keeps_the_data_of_a_problem_that_is_given_no_others():
    options = {"key": jax.random.key(0), "progress": False}
    tree = infer(FIRST, Gradients(), **options)
    expected = infer(model, Gradients(), *FIRST.args, **FIRST.kwargs, **options)
    np.testing.assert_array_equal(tree.observed_data["y"], FIRST.sites.data["y"])
    np.testing.assert_allclose(tree.posterior["x"], expected.posterior["x"], rtol=1e-8)


def test_a_batch_of_problems():
    problems = [FIRST.with_data(y, scale=jnp.array(1.0)) for y in Y]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    found = eqx.filter_vmap(lambda problem: problem.log_density(POSITION))(batch)
    expected = [problem.log_density(POSITION) for problem in problems]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def masked(y, seen):
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x[seen], 1.0).to_event(1), obs=y[seen])


def named(y, labels):
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, float(len(labels))).to_event(1), obs=y)


class Labels(list):
    """Not a tree, and not hashable."""


@pytest.mark.parametrize(
    ("of", "other"), [(masked, np.array([True, False])), (named, Labels("ab"))]
)
def test_arguments_that_cannot_be_inputs_are_refused_but_run_alone(of, other):
    problem = Problem.from_model(of, Y[0], other)
    assert jnp.isfinite(log_density(problem, {"x": POSITION["x"]}))
    with pytest.raises(ValueError, match=r"cannot be inputs .* use Problem.from_model"):
        problem.with_data(Y[1], other)


def test_the_centred_form_of_one_problem_is_one_object():
    """Programs know a problem by its identity: a new object every time would compile every run."""
    assert FIRST.centred(with_value=False) is FIRST.centred()
