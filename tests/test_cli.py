"""The demo end to end on a short run, its summary, and one line for every bad argument."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scoreprior as sp
from scoreprior import cli

# Imported after NumPyro: ArviZ imports it too, and under `-W error` leaves it half imported.
az = cli.az

BAD = {
    "--digit 180": r"argument --digit: must be a whole number from 0 to 179, got '180'",
    "--digit seven": r"argument --digit: must be a whole number .*, got 'seven'",
    "--noise nan": r"argument --noise: must be a positive number, got 'nan'",
    "--noise -1": r"argument --noise: must be a positive number, got '-1'",
    "--problem crop": r"argument --problem: invalid choice: 'crop' \(choose from 'restore', ",
    "--seed -1": r"argument --seed: must be a whole number at least 0, got '-1'",
    "--num-chains 1": r"argument --num-chains: must be a whole number at least 2, got '1'",
    "--colour red": r"unrecognized arguments: --colour red",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_values_give_one_line_and_exit_code_2(capsys, options):
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", *options.split()])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(BAD[options], lines[0])


def test_a_folder_that_cannot_be_made_gives_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", "--output", str(tmp_path / "file")])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "argument --output: must be a folder that can be written to" in line


def test_a_bad_argument_makes_no_folder(tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--output", str(tmp_path / "new"), "--noise", "-1"])
    assert not (tmp_path / "new").exists()


def test_six_steps_are_as_exact_as_the_demo_says():
    prior = sp.load("digits")
    flow = cli._coarse(prior).flow
    fine = sp.Flow(
        flow.denoiser,
        flow.moments,
        sigma_min=flow.sigma_min,
        sigma_max=flow.sigma_max,
        solver=dataclasses.replace(flow.solver, num_steps=60),
    )
    u = jax.random.normal(jax.random.key(0), (200, 8, 8), prior.flow.moments.mean.dtype)
    coarse, exact = (jax.jit(jax.vmap(each.to_data))(u) for each in (flow, fine))
    assert 0.03 < float(jnp.sqrt(jnp.mean((coarse - exact) ** 2))) < 0.05


def test_no_command_gives_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", cli.OBSERVATIONS)
def test_observations_are_linear_and_keep_constants(name):
    forward = cli.OBSERVATIONS[name].forward
    a, b = jax.random.normal(jax.random.key(0), (2, 8, 8))
    np.testing.assert_allclose(forward(2 * a + b), 2 * forward(a) + forward(b), atol=1e-12)
    np.testing.assert_allclose(forward(jnp.full((8, 8), 3.0)), 3.0)


def test_hidden_rows_are_not_seen():
    a = jnp.zeros((8, 8)).at[6].set(1.0)
    for name in ("restore", "inpaint"):
        observation = cli.OBSERVATIONS[name]
        assert jnp.all(observation.forward(a) == 0)
        panel = observation.panel(observation.forward(a))
        np.testing.assert_array_equal(np.isnan(panel).any(1), np.arange(8) >= 4)


def test_blur_is_the_binomial_kernel():
    point = cli.blur(jnp.zeros((8, 8)).at[3, 4].set(16.0))
    np.testing.assert_allclose(point[2:5, 3:6], [[1, 2, 1], [2, 4, 2], [1, 2, 1]])
    np.testing.assert_allclose(point.sum(), 16)


def test_the_summary_counts_what_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4, 500, 8, 8))
    truth = np.zeros((8, 8))
    truth[0] = 9.0  # eight pixels outside every interval
    stats = {"diverging": np.arange(2000).reshape(4, 500) < 3}
    noise = 2 + 0.1 * rng.normal(size=(4, 500))
    tree = az.from_dict({"posterior": {"x": draws, "noise": noise}, "sample_stats": stats})
    text = cli.summarise(tree, truth, 2.0)
    assert re.search(r"pixels within their 90 % interval +56 of 64 \(88%\)", text)
    assert re.search(r"noise level, inferred +2\.00 \+- 0\.10", text)
    assert re.search(r"its 90 % interval +1\.8\d to 2\.1\d", text)
    assert re.search(r"divergences +3$", text)
    assert re.search(r"posterior mean \(rms\) +3\.18", text)  # 9 / sqrt(8)


@pytest.mark.slow
@pytest.mark.promotes_ranks
def test_a_short_demo_writes_what_it_announces(tmp_path, capsys):
    short = "--num-warmup 30 --num-samples 20 --num-chains 2 --problem superres"
    code = cli.main(["demo", "--output", str(tmp_path), "--digit", "5", *short.split()])
    assert code == 0
    out = capsys.readouterr().out
    assert re.search(r"time +\d+ s, of which \d+ s compiling", out)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["posterior.nc", "posterior.png"]
    tree = az.from_netcdf(tmp_path / "posterior.nc")
    assert tree["posterior"]["x"].dims == ("chain", "draw", "row", "col")
    assert tree["observed_data"]["y"].shape == (4, 4)
    # Even a short run is nearer to the image than to its neighbour in the data set.
    images = np.asarray(sp.load_images("digits")) + 0.5
    mean = np.asarray(tree["posterior"]["x"].mean(("chain", "draw")))
    assert np.linalg.norm(mean - images[5]) < np.linalg.norm(mean - images[6])
