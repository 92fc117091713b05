"""`infer`: the tree it returns, interruption and resumption, warnings and errors."""

import functools
import os
import signal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from blackjax import nuts

import scoreprior._run as run_module
from killing import kill_a_run
from scoreprior.denoise import Gaussian
from scoreprior.density import FlowDensity, ScoreGradient, ScoreOnly
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.infer import infer
from scoreprior.mcmc import NUTS
from scoreprior.mcmc.start import start_chains
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem

pytestmark = pytest.mark.promotes_ranks

KEY = jax.random.key(3)


def gaussian(shape, density=None):
    law = Gaussian(Moments(jnp.zeros(shape), jnp.ones(shape)))
    return ScorePrior(Flow(law, law.law, sigma_min=0.1, solver=FixedGrid(1)), density)


LINE = gaussian((2,))
ENGINE = NUTS(30, 24, 2, chunk_size=7)


def line(y):
    noise = numpyro.sample("noise", dist.LogNormal(-0.5, 0.3))
    x = numpyro.sample("x", LINE)
    numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


Y = jnp.array([0.5, -1.0])


@functools.cache
def problem():
    """One object, so that its compiled programs are shared."""
    return Problem.from_model(line, Y)


def draw(engine=ENGINE, key=KEY, checkpoint=None, y=None):
    of = problem() if y is None else Problem.from_model(line, y)
    return engine.run(of, key, progress=False, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def reference():
    jax.config.update("jax_numpy_rank_promotion", "allow")
    return draw()


def assert_same(draws, expected, num_draws=None):
    for group in ("positions", "stats"):
        ours, theirs = getattr(draws, group), getattr(expected, group)
        assert set(ours) == set(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name][:, :num_draws])


@pytest.fixture(scope="module")
def tree():
    jax.config.update("jax_numpy_rank_promotion", "allow")
    image, strip = gaussian((2, 3)), gaussian((1, 2))

    def model(y, bias):
        noise = numpyro.sample("noise", dist.LogNormal(-0.5, 0.3))
        weights = numpyro.sample("weights", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        with numpyro.plate("epoch", 4):
            x = numpyro.sample("x", image)
            level = numpyro.deterministic("level", x.sum((-1, -2)))
            numpyro.sample("y", dist.Normal(x + bias, noise).to_event(2), obs=y)
        z = numpyro.sample("z", strip)
        numpyro.deterministic("doubled", 2 * x[0])
        numpyro.sample("counts", dist.Poisson(jnp.exp(weights.sum() + 0.1 * z.sum())), obs=3)
        numpyro.factor("penalty", -0.01 * (level**2).sum())

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "chains disagree")
        return infer(
            model,
            NUTS(40, 30, 3),
            jnp.ones((4, 2, 3)),
            bias=0.1,
            key=KEY,
            progress=False,
            num_prior=5,
            posterior_predictive=True,
            coords={"epoch": [2019, 2020, 2021, 2022]},
            dims={"weights": ["coefficient"]},
        )


def test_groups_and_named_axes(tree):
    posterior = {name: array.dims[2:] for name, array in tree["posterior"].data_vars.items()}
    assert posterior == {
        "noise": (),
        "weights": ("coefficient",),
        "x": ("epoch", "row", "col"),
        "level": ("epoch",),
        "z": ("z_row", "z_col"),
        "doubled": ("row", "col"),
    }
    assert dict(tree["posterior"].sizes) == {
        "chain": 3, "draw": 30, "epoch": 4, "row": 2, "col": 3, "z_row": 1, "z_col": 2,
        "coefficient": 2,
    }  # fmt: skip
    assert tree["prior"]["x"].dims == ("chain", "draw", "epoch", "row", "col")
    assert tree["prior"].sizes["draw"] == tree["prior_predictive"].sizes["draw"] == 5
    assert tree["posterior_predictive"]["y"].dims == ("chain", "draw", "epoch", "row", "col")
    assert tree["posterior_predictive"]["counts"].dims == ("chain", "draw")
    assert tree["observed_data"]["y"].dims == ("epoch", "row", "col")
    assert set(tree["observed_data"].data_vars) == {"y", "counts"}
    np.testing.assert_array_equal(tree["posterior"]["epoch"], [2019, 2020, 2021, 2022])


def test_values_belong_together(tree):
    posterior = tree["posterior"].dataset
    np.testing.assert_allclose(posterior["x"].sum(("row", "col")), posterior["level"])
    np.testing.assert_allclose(2 * posterior["x"].isel(epoch=0), posterior["doubled"])
    predicted = tree["posterior_predictive"]["y"] - posterior["x"] - 0.1
    ratio = (predicted / posterior["noise"]).values
    assert abs(ratio.std() - 1) < 5 / np.sqrt(2 * ratio.size)
    assert abs(ratio.mean()) < 5 / np.sqrt(ratio.size)


def test_sample_stats_and_provenance(tree):
    stats = tree["sample_stats"].dataset
    assert set(stats.data_vars) == {
        "acceptance_rate", "diverging", "energy", "lp", "n_steps", "reached_max_tree_depth",
        "step_size", "tree_depth",
    }  # fmt: skip
    assert ((stats["n_steps"] >= 1) & (stats["n_steps"] < 2 ** stats["tree_depth"])).all()
    assert (stats["energy"] >= -stats["lp"]).mean() > 0.5
    assert "num_warmup=40, num_samples=30, num_chains=3, centred=False" in tree.attrs["engine"]
    assert tree.attrs["problem"].endswith("non-centred)")
    assert tree.attrs["inference_library"] == "scoreprior"
    assert tree.attrs["sampling_time"] > 0


def test_a_tree_goes_to_disk_and_back(tree, tmp_path):
    tree.to_netcdf(tmp_path / "tree.nc")
    with xr.open_datatree(tmp_path / "tree.nc") as stored:
        assert stored.attrs["engine"] == tree.attrs["engine"]
        xr.testing.assert_equal(stored["posterior"].dataset, tree["posterior"].dataset)


def test_log_density_is_that_of_the_position(reference):
    lp = jax.vmap(jax.vmap(problem().log_density))(reference.positions)
    np.testing.assert_allclose(lp, reference.stats["lp"], rtol=1e-10)


def test_chunks_do_not_change_the_draws(reference):
    assert_same(draw(NUTS(30, 24, 2, chunk_size=100)), reference)


def test_a_key_gives_its_draws(reference):
    assert_same(draw(), reference)
    other = draw(key=jax.random.key(4))
    assert not np.array_equal(other.positions["x"], reference.positions["x"])


class Interrupting(run_module.tqdm):
    """A progress bar during whose sixth update the user presses Ctrl-C."""

    num_updates = 6

    def update(self, n=1):
        self.count = getattr(self, "count", 0) + 1
        if self.count == self.num_updates:
            # Where the shell ignores Ctrl-C, as in the background, Python would too.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGINT)
        return super().update(n)


def test_ctrl_c_returns_the_draws_made_so_far(reference, monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "tqdm", Interrupting)
    with pytest.warns(UserWarning, match="interrupted: 12 of 24 draws per chain are returned"):
        draws = draw(checkpoint=tmp_path / "run")
    assert draws.interrupted
    assert_same(draws, reference, num_draws=12)
    monkeypatch.undo()
    assert_same(draw(checkpoint=tmp_path / "run"), reference)


def test_ctrl_c_in_the_warm_up_has_nothing_to_return(monkeypatch):
    monkeypatch.setattr(run_module, "tqdm", Interrupting)
    monkeypatch.setattr(Interrupting, "num_updates", 2)
    with pytest.raises(KeyboardInterrupt, match="before the first draw"):
        draw()


def test_a_killed_run_resumes_bit_for_bit(reference, tmp_path, stored_steps):
    kill_a_run("test_infer", 35, tmp_path / "run")
    assert_same(draw(checkpoint=tmp_path / "run"), reference)
    assert stored_steps == [42, 49, 54]
    # A finished run returns its draws without another step.
    assert_same(draw(checkpoint=tmp_path / "run"), reference)
    assert stored_steps == [42, 49, 54]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    jax.config.update("jax_numpy_rank_promotion", "allow")
    path = tmp_path_factory.mktemp("checkpoint") / "run"
    draw(checkpoint=path)
    return path


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"engine": NUTS(30, 25, 2)}, r"differs in num_samples \(24 there, 25 here\)"),
        ({"key": jax.random.key(9)}, r"differs in .*key \("),
        ({"y": Y + 1e-6}, r"differs in data "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(stored, change, match):
    with pytest.raises(ValueError, match=match):
        draw(checkpoint=stored, **change)


def test_a_checkpoint_under_another_gradient_is_refused(tmp_path):
    def model(prior, y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    engine = NUTS(0, 2, 1, centred=True, step_size=0.1)
    through_flow = Problem.from_model(model, LINE, Y)
    engine.run(through_flow, KEY, progress=False, checkpoint=tmp_path / "run")
    scored = LINE.with_density(FlowDensity(gradient=ScoreGradient(3.0)))
    with pytest.raises(ValueError, match="differs in start"):
        engine.run(
            Problem.from_model(model, scored, Y), KEY, progress=False, checkpoint=tmp_path / "run"
        )


def test_without_warm_up_the_step_size_is_the_one_given():
    stats = draw(NUTS(0, 3, 2, step_size=0.25)).stats
    np.testing.assert_array_equal(stats["step_size"], np.full((2, 3), 0.25))
    with pytest.raises(ValueError, match="step_size must be a positive finite number, got -1"):
        NUTS(step_size=-1.0)


@pytest.mark.parametrize("name", ["state.npz", "settings.json", "draws-0000030.npz"])
def test_a_damaged_checkpoint_is_refused(stored, tmp_path, name):
    path = tmp_path / "run"
    path.mkdir()
    for file in stored.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        draw(checkpoint=path)


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not a checkpoint directory"):
        draw(checkpoint=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_failed_chunk_loses_nothing(reference, tmp_path, monkeypatch):
    class Failing(run_module.tqdm):
        def update(self, n=1):
            self.count = getattr(self, "count", 0) + 1
            if self.count == 6:
                raise RuntimeError("out of memory")

    monkeypatch.setattr(run_module, "tqdm", Failing)
    with pytest.raises(RuntimeError, match="out of memory") as failure:
        draw(checkpoint=tmp_path / "run")
    assert failure.value.__notes__ == [f"42 of 54 steps are kept in {tmp_path / 'run'}"]
    monkeypatch.undo()
    assert_same(draw(checkpoint=tmp_path / "run"), reference)


def test_divergences_and_saturation_are_reported_with_the_remedy():
    def funnel():
        log_scale = numpyro.sample("log_scale", dist.Normal(0.0, 3.0))
        numpyro.sample("z", dist.Normal(jnp.zeros(4), jnp.exp(log_scale)).to_event(1))
        numpyro.sample("x", LINE)

    engine = NUTS(40, 60, 4, target_accept=0.5, max_tree_depth=3)
    with (
        pytest.warns(UserWarning, match="draws diverged.*raise target_accept above 0.5"),
        pytest.warns(UserWarning, match="reached max_tree_depth = 3: .*try dense_mass") as caught,
    ):
        engine.run(Problem.from_model(funnel), KEY, progress=False)
    assert len(caught) == 2


def test_chains_in_different_modes_are_reported():
    def model():
        x = numpyro.sample("x", LINE)
        numpyro.factor("modes", -0.5 * ((x[0] ** 2 - 4) / 0.05) ** 2)

    engine = NUTS(100, 50, 8, target_accept=0.9)
    with pytest.warns(UserWarning, match="chains disagree: the largest R-hat is .* for 'x'"):
        infer(model, engine, key=KEY, progress=False)


def test_an_impossible_posterior_says_where():
    def model():
        x = numpyro.sample("x", LINE)
        numpyro.factor("nothing", jnp.where(x[0] > 100, 0.0, -jnp.inf))

    with pytest.raises(ValueError, match="not finite at 4 of 4 starting points.*= -inf"):
        infer(model, NUTS(), key=KEY, progress=False)


def test_a_rare_prior_draw_is_drawn_again():
    def model():
        x = numpyro.sample("x", LINE)
        numpyro.factor("half", jnp.where(x[0] > 0.5, 0.0, -jnp.inf))

    states = start_chains(Problem.from_model(model), nuts.init, KEY, 16)
    assert np.isfinite(states.logdensity).all()
    assert len(np.unique(states.position["x"])) == 32


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"num_warmup": -1}, ValueError, "num_warmup must be at least 0, got -1"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_chains": 2.0}, TypeError, "num_chains must be an int, got 2.0"),
        ({"target_accept": 1.0}, ValueError, "target_accept must be between 0 and 1, got 1.0"),
        ({"max_tree_depth": 0}, ValueError, "max_tree_depth must be at least 1, got 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    ],
)
def test_bad_settings(as_user, settings, error, match):
    with pytest.raises(error, match=match):
        NUTS(**settings)


def with_key(y, key=None):
    line(y)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"engine": NUTS}, TypeError, "engine must be an engine such as NUTS"),
        ({"key": 0}, TypeError, r"key must be a random key such as jax.random.key\(0\), got 0"),
        ({"model": 3}, TypeError, "model must be a NumPyro model"),
        ({"model": with_key}, ValueError, "an argument with the name .* of infer, 'key'"),
        ({"num_prior": -1}, ValueError, "num_prior must be at least 0, got -1"),
        ({"dims": {"w": ["a"]}}, ValueError, r"dims must name sites .*got 'w'"),
        (
            {"dims": {"x": ["a", "b"]}},
            ValueError,
            r"dims\['x'\] must have a name for each of the 1",
        ),
        ({"coords": {"a": [1]}}, ValueError, r"coords must name dims.*got 'a'"),
        ({"coords": {"x_dim_0": [1]}}, ValueError, r"coords\['x_dim_0'\] must have 2 values"),
    ],
)
def test_bad_arguments_fail_before_any_compilation(as_user, arguments, error, match):
    arguments = {"model": line, "engine": ENGINE, "key": KEY, **arguments}
    with pytest.raises(error, match=match):
        infer(arguments.pop("model"), arguments.pop("engine"), Y, **arguments)


def test_the_centred_form_needs_a_density():
    prior = gaussian((2,), ScoreOnly())

    def model():
        numpyro.sample("x", prior)

    with pytest.raises(NotImplementedError, match="ScoreOnly has no log_prob"):
        infer(model, NUTS(centred=True), key=KEY, progress=False)
