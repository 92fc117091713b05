"""Runs of VI, Pathfinder and REDDiff: the tree, resumption, saved guides, warnings and errors."""

import functools
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import oracles
import scoreprior as sp
import scoreprior._run as run_module
from killing import kill_a_run
from oracles import A_G, GAUSSIAN, SD_G, Y_G
from scoreprior.density import FlowDensity, ScoreGradient, ScoreOnly
from scoreprior.flow import FixedGrid, Flow
from scoreprior.infer import infer
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.vi import (
    ELBO,
    IAF,
    IWELBO,
    VI,
    FittedGuide,
    FullRank,
    LowRank,
    MeanField,
    Pathfinder,
    Paths,
    REDDiff,
)
from stats import require_power

pytestmark = pytest.mark.promotes_ranks

KEY = jax.random.key(3)
FLOW = Flow(GAUSSIAN, GAUSSIAN.moments(), sigma_min=0.1, solver=FixedGrid(1))
PRIOR = ScorePrior(FLOW)
ENGINE = VI(MeanField(), 120, 200, chunk_size=40)


def line(y, prior=PRIOR):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(A_G @ x, SD_G).to_event(1), obs=y)


@functools.cache
def problem():
    """One object, so that its compiled programs are shared."""
    return Problem.from_model(line, Y_G)


def fit(engine=ENGINE, key=KEY, checkpoint=None, of=None):
    return engine.fit(of or problem(), key, progress=False, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def reference():
    jax.config.update("jax_numpy_rank_promotion", "allow")
    return fit()


def assert_same(fitted, expected):
    for mine, theirs in zip(jax.tree.leaves(fitted), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(mine, theirs)


class Interrupting(run_module.tqdm):
    """A progress bar during whose second update the user presses Ctrl-C."""

    def update(self, n=1):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 2:
            # Where the shell ignores Ctrl-C, as in the background, Python would too.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGINT)
        return super().update(n)


@pytest.mark.filterwarnings("ignore:k-hat is")  # the fit is short
def test_the_tree_and_a_guide_used_again(reference, tmp_path):
    tree = infer(line, ENGINE, Y_G, key=KEY, progress=False)
    assert dict(tree["posterior"].sizes) == {"chain": 1, "draw": 200, "x_dim_0": 2}
    stats = tree["sample_stats"]
    for name in ("elbo", "elbo_se", "log_evidence", "log_evidence_se", "khat"):
        assert stats[name].dims == ()
    assert stats["bound"].dims == ("step",)
    assert stats["log_weight"].dims == stats["lp"].dims == ("chain", "draw")
    np.testing.assert_allclose(stats["elbo"], stats["log_weight"].mean())
    assert "VI(guide=MeanField(" in tree.attrs["engine"]
    tree.to_netcdf(tmp_path / "tree.nc")
    again = infer(line, reference, Y_G, key=KEY, progress=False)
    assert again["posterior"].sizes == tree["posterior"].sizes
    assert "FittedGuide(" in again.attrs["engine"]
    assert abs(float(again["sample_stats"]["elbo"] - stats["elbo"])) < 0.1


def test_ctrl_c_keeps_the_guide_and_the_fit_resumes_bit_for_bit(reference, monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "tqdm", Interrupting)
    with pytest.warns(UserWarning, match="interrupted after 80 of 120 steps: the guide is as"):
        partial = fit(checkpoint=tmp_path / "run")
    assert partial.interrupted
    np.testing.assert_array_equal(partial.history, reference.history[:80])
    monkeypatch.undo()
    assert_same(fit(checkpoint=tmp_path / "run"), reference)
    # A finished fit is read, and other chunks give the same numbers.
    assert_same(fit(checkpoint=tmp_path / "run"), reference)
    other = fit(VI(MeanField(), 120, 200, chunk_size=50))
    np.testing.assert_allclose(other.history, reference.history, rtol=1e-9)


def test_a_killed_fit_resumes_bit_for_bit(reference, tmp_path, stored_steps):
    kill_a_run("test_vi_run", 80, tmp_path / "run", function="fit")
    assert_same(fit(checkpoint=tmp_path / "run"), reference)
    assert stored_steps == [120]


@pytest.mark.filterwarnings("ignore:k-hat is")
def test_ctrl_c_in_infer_keeps_draws(monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "tqdm", Interrupting)
    with pytest.warns(UserWarning, match="interrupted after 80 of 120 steps"):
        tree = infer(line, ENGINE, Y_G, key=KEY, progress=False, checkpoint=tmp_path / "run")
    assert tree.attrs["interrupted"] == 1
    assert tree["posterior"].sizes["draw"] == 200


def test_ctrl_c_before_the_first_chunk_has_nothing_to_return(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("scoreprior.vi.engine._advance", interrupted)
    with pytest.raises(KeyboardInterrupt, match="before the first chunk"):
        fit()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"engine": VI(MeanField(0.2), 120, 200, chunk_size=40)}, "differs in guide"),
        ({"engine": VI(MeanField(), 120, 200, bound=ELBO(4), chunk_size=40)}, "differs in bound"),
        (
            {"engine": VI(MeanField(), 120, optimizer=optax.adam(0.03), chunk_size=40)},
            "differs in optimizer",
        ),
        ({"key": jax.random.key(9)}, "differs in key"),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused(reference, tmp_path, change, match):
    fit(checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match=match):
        fit(checkpoint=tmp_path / "run", **change)


@pytest.mark.parametrize("guide", [LowRank(1), FullRank(), IAF(1)], ids=repr)
def test_a_saved_guide_comes_back_bit_for_bit(tmp_path, guide):
    size = 2
    params = guide.init(KEY, size)
    frame = fitted_frame()
    fitted = FittedGuide(guide, params, frame, jnp.arange(3.0), False, data(), 64, True)
    fitted.save(tmp_path / "guide")
    again = FittedGuide.load(tmp_path / "guide", problem())
    assert repr(again) == repr(fitted)
    assert "init_scale=0.1)" in repr(again)
    assert_same(again, fitted)
    assert jax.tree.structure(again) == jax.tree.structure(fitted)
    drawn = fitted.sample(KEY, 5)
    np.testing.assert_array_equal(drawn["x"], again.sample(KEY, 5)["x"])


def fitted_frame():
    from scoreprior.vi.frame import Frame

    return Frame(jnp.array([0.5, -1.0]), jnp.array([2.0, 3.0]), (("x", (2,)),))


def data():
    from scoreprior.vi.fitted import data_of

    return data_of(problem())


def test_log_prob_is_a_density_in_the_coordinates_of_the_position():
    fitted = FittedGuide(
        MeanField(), MeanField(0.7).init(KEY, 2), fitted_frame(), jnp.zeros(1), False, data()
    )
    x = {"x": jnp.array([0.9, 0.3])}
    expected = dist.Normal(fitted_frame().loc, 0.7 * fitted_frame().scale).log_prob(x["x"]).sum()
    np.testing.assert_allclose(fitted.log_prob(x), expected)
    with pytest.raises(ValueError, match="position must have sites and shapes"):
        fitted.log_prob({"u": x["x"]})
    with pytest.raises(ValueError, match="leave checkpoint out"):
        fitted.run(problem(), KEY, checkpoint="run")


def test_files_that_are_no_guide_of_this_problem(reference, tmp_path):
    path = tmp_path / "guide"
    with pytest.raises(FileNotFoundError, match="no folder"):
        FittedGuide.load(path, problem())
    reference.save(path)
    with pytest.raises(ValueError, match="model, its data among them, differ"):
        FittedGuide.load(path, Problem.from_model(line, Y_G + 1e-3))
    wide = Problem.from_model(lambda: numpyro.sample("z", PRIOR))
    with pytest.raises(ValueError, match="fitted to sites of shapes .*'x'.* this one has .*'z'"):
        FittedGuide.load(path, wide)
    tensors = path / "model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="save the guide again"):
        FittedGuide.load(path, problem())
    tensors.write_bytes(whole)
    sp.save(tmp_path / "prior", PRIOR)
    with pytest.raises(ValueError, match="not the config of a guide saved by FittedGuide.save"):
        FittedGuide.load(tmp_path / "prior", problem())
    with pytest.raises(FileExistsError, match="not a saved guide"):
        reference.save(tmp_path / "prior")
    with pytest.raises(ValueError, match="not the config of a prior"):
        sp.load(path)


def test_steps_that_are_not_finite_are_left_out_and_reported():
    def model():
        x = numpyro.sample("x", PRIOR)
        numpyro.factor("wall", jnp.where(x[0] > 4, jnp.nan, 8 * x[0]))

    with pytest.warns(UserWarning, match=r"\d+ of 120 steps were skipped because the bound"):
        fitted = fit(VI(MeanField(), 120, optimizer=optax.adam(0.1)), of=Problem.from_model(model))
    assert np.isfinite(np.asarray(jax.tree.leaves(fitted.params))).all()


def factor(function):
    def model():
        x = numpyro.sample("x", PRIOR)
        numpyro.factor("factor", function(x))

    return Problem.from_model(model)


@pytest.mark.parametrize(
    ("engine", "function", "match"),
    [
        (ENGINE, lambda x: jnp.sqrt(x[0]), "NaN or plus infinity at .* of 8 prior draws"),
        (REDDiff(1.0), lambda x: jnp.log(-(x[1] ** 2)), "NaN or plus infinity at 8 of 8 prior"),
        (
            Pathfinder(),
            lambda x: jnp.where(x[0] > 100, 0.0, -jnp.inf),
            "minus infinity at all 8 prior draws",
        ),
    ],
    ids=["VI", "REDDiff", "Pathfinder"],
)
def test_impossible_problems_fail_before_the_first_step(engine, function, match):
    with pytest.raises(ValueError, match=match):
        engine.run(factor(function), KEY, progress=False)


@pytest.mark.parametrize("engine", [VI(MeanField(), centred=True), Pathfinder(centred=True)])
def test_the_centred_form_needs_a_density_with_its_own_gradient(engine):
    score = ScorePrior(FLOW, FlowDensity(gradient=ScoreGradient()))
    with pytest.raises(ValueError, match="'x' has a FlowDensity with a ScoreGradient"):
        engine.run(Problem.from_model(line, Y_G, score), KEY)
    with pytest.raises(NotImplementedError, match="ScoreOnly has no log_prob"):
        engine.run(Problem.from_model(line, Y_G, ScorePrior(FLOW, ScoreOnly())), KEY)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: VI("full"), TypeError, "guide must be a guide such as FullRank"),
        (lambda: VI(FullRank(), bound=8), TypeError, "bound must be a bound such as ELBO"),
        (lambda: VI(FullRank(), 0), ValueError, "num_steps must be at least 1, got 0"),
        (lambda: VI(FullRank(), 10, 9), ValueError, "num_samples must be at least 25, got 9"),
        (lambda: VI(FullRank(), optimizer=0.1), TypeError, "optimizer must be an optax"),
        (lambda: VI(FullRank(), chunk_size=0), ValueError, "chunk_size must be at least 1"),
        (lambda: MeanField(0.0), ValueError, "init_scale must be a positive finite number"),
        (lambda: LowRank(0), ValueError, "rank must be at least 1, got 0"),
        (lambda: IAF(0), ValueError, "num_flows must be at least 1, got 0"),
        (lambda: IAF().init(KEY, 1), ValueError, "IAF needs at least two coordinates"),
        (lambda: IAF(width=4).init(KEY, 5), ValueError, "width must be at least the 5"),
        (lambda: ELBO(0), ValueError, "num_particles must be at least 1, got 0"),
        (lambda: IWELBO(1), ValueError, "num_particles must be at least 2, got 1"),
        (lambda: Pathfinder(0), ValueError, "num_paths must be at least 1, got 0"),
        (lambda: REDDiff(0.0), ValueError, "weight must be a positive finite number, got 0.0"),
        (lambda: REDDiff(1.0, num_chains=0), ValueError, "num_chains must be at least 1"),
    ],
)
def test_bad_settings(as_user, make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_pathfinder_resumes_and_keeps_finished_paths(monkeypatch, tmp_path):
    engine = Pathfinder(3, 1000, max_iterations=20, num_elbo_samples=20)
    full = fit(engine)
    assert full.guide == Paths(3)
    monkeypatch.setattr(run_module, "tqdm", Interrupting)
    with pytest.warns(UserWarning, match="interrupted after 2 of 3 paths"):
        partial = fit(engine, checkpoint=tmp_path / "run")
    assert partial.guide == Paths(2)
    monkeypatch.undo()
    assert_same(fit(engine, checkpoint=tmp_path / "run"), full)
    full.save(tmp_path / "guide")
    again = FittedGuide.load(tmp_path / "guide", problem())
    assert_same(again, full)
    draws = again.run(problem(), KEY)
    assert draws.extra["bound"][0] == ("path",)
    law = oracles.at_level(GAUSSIAN, 0.1)
    truth = float(law.log_evidence(A_G, Y_G, jnp.eye(1) * SD_G**2))
    elbo, evidence, se = (
        float(draws.extra[name][1]) for name in ("elbo", "log_evidence", "log_evidence_se")
    )
    assert abs(evidence - truth) <= 5 * se + 1e-3
    assert se < 0.02
    assert truth - 0.1 < elbo <= truth + 5 * se + 1e-3


def exact_red(weight, power, shift_precision):
    """Minimum `(x, shift)` of the objective, its precision in `x` a mean over noise levels."""
    covariance, mean = GAUSSIAN.law.covariance(), GAUSSIAN.law.mean
    ends = jnp.log(FLOW.sigma_min), jnp.log(FLOW.sigma_max)
    levels = jnp.exp(jnp.linspace(*ends, 20_001))
    each = lambda s: s ** (power + 1) * jnp.linalg.inv(covariance + s**2 * jnp.eye(2))
    precision = jnp.zeros((3, 3)).at[2, 2].set(shift_precision)
    precision = precision.at[:2, :2].set(weight * jnp.mean(jax.vmap(each)(levels), 0))
    forward = jnp.concatenate([A_G, jnp.ones((1, 1))], 1)
    right = forward.T @ Y_G / SD_G**2 + precision @ jnp.append(mean, 0.0)
    return jnp.linalg.solve(forward.T @ forward / SD_G**2 + precision, right)


def check_red(x, weight, power, shift_precision):
    """Chains [16, 3] are independent: their spread is the noise of the levels."""
    se = x.std(0, ddof=1) / 4
    expected = exact_red(weight, power, shift_precision)
    assert (np.abs(x.mean(0) - expected) <= 5 * se + 1e-3).all(), "not the mode"
    require_power(se, 0.4, bias=0.2)


MODES = "modes and not posterior draws"


def test_red_diff_finds_the_mode_of_its_objective():
    # Without a density, which it does not need.
    of = Problem.from_model(line, Y_G, ScorePrior(FLOW, ScoreOnly()))
    with pytest.warns(UserWarning, match=MODES):
        draws = REDDiff(0.8, 1500, 16).run(of, KEY, progress=False)
    assert draws.positions["x"].shape == (16, 1, 2)
    x = np.c_[draws.positions["x"][:, 0], np.zeros(16)]
    check_red(x, 0.8, 1.0, 1e12)
    with pytest.raises(AssertionError, match="not the mode"):
        check_red(x, 0.3, 1.0, 1e12)
    with_density = problem().centred()
    expected = jax.vmap(with_density.log_likelihood)({"x": draws.positions["x"][:, 0]})
    np.testing.assert_allclose(draws.stats["log_likelihood"][:, 0], expected)


def test_red_diff_finds_nuisance_parameters_too_and_resumes_bit_for_bit(monkeypatch, tmp_path):
    def model(y):
        shift = numpyro.sample("shift", dist.Normal(0.0, 0.5))
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("y", dist.Normal(A_G @ x + shift, SD_G).to_event(1), obs=y)

    engine = REDDiff(0.8, 1500, 16, power=-1.0, chunk_size=500)
    of = Problem.from_model(model, Y_G)
    monkeypatch.setattr(run_module, "tqdm", Interrupting)
    with pytest.warns(UserWarning, match="interrupted after|" + MODES) as caught:
        partial = engine.run(of, KEY, progress=False, checkpoint=tmp_path / "run")
    found = " ".join(str(one.message) for one in caught)
    assert MODES in found
    assert "interrupted after 1000 of 1500 steps" in found
    assert partial.interrupted
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=MODES):
        full = engine.run(of, KEY, progress=False)
    with pytest.warns(UserWarning, match=MODES):
        again = engine.run(of, KEY, progress=False, checkpoint=tmp_path / "run")
    for name in ("x", "shift"):
        np.testing.assert_array_equal(again.positions[name], full.positions[name])
    x = np.c_[full.positions["x"][:, 0], full.positions["shift"][:, 0]]
    check_red(x, 0.8, -1.0, 4.0)


def test_red_diff_needs_the_site_of_a_flow():
    def model():
        shifted = dist.TransformedDistribution(
            PRIOR, dist.transforms.AffineTransform(jnp.zeros(2), 2.0)
        )
        numpyro.sample("x", shifted)

    with pytest.raises(ValueError, match=re.escape("'x' is a ScorePrior behind further trans")):
        REDDiff(1.0).run(Problem.from_model(model), KEY)
