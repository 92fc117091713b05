"""Saved priors come back bit for bit; damaged, foreign and unsuitable files say what they are."""

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions.batch_util import promote_batch_shape
from safetensors.numpy import load_file, save_file

import scoreprior as sp
from priors import PRIORS, SCORE, build, mixture, network
from scoreprior.denoise import (
    Calibrated,
    Conditioned,
    Gaussian,
    GaussianMixture,
    NoisePrediction,
    Rescaled,
    Smoothed,
)
from scoreprior.denoise.adapt import VP, Discrete
from scoreprior.flow import HEUN, AbstractTime, ArctanTime, LogRatioTime, PowerTime
from scoreprior.nn import ResidualMLP, UNet


def noise_prediction():
    net = ResidualMLP((2,), width=8, num_blocks=1, embedding_size=8, key=jax.random.key(0))
    return NoisePrediction(net, VP(0.2, 15.0))


def stationary():
    data = jax.random.normal(jax.random.key(0), (64, 4, 4))
    return Gaussian(sp.Moments.fit(data, sp.Fourier()))


def separable():
    data = jax.random.normal(jax.random.key(0), (64, 2, 4))
    return sp.Moments.fit(data, sp.Separable())


def unet():
    net = UNet((4, 4), widths=(4, 8), embedding_size=8, key=jax.random.key(0))
    return sp.denoise.Network(net, stationary().moments())


def flow(denoiser, moments=None, **options):
    moments = denoiser.moments() if moments is None else moments
    return sp.ScorePrior(sp.Flow(denoiser, moments, sigma_min=0.1, sigma_max=10.0, **options))


def moved():
    law = mixture().moments()
    return Rescaled(mixture(), jnp.array([1.0, 2.0]), 3.0), sp.Moments.dense(
        law.mean, law.covariance()
    )


def energy():
    net = ResidualMLP((2,), width=8, num_blocks=1, embedding_size=8, key=jax.random.key(0))
    moments = mixture().moments()
    denoiser = sp.denoise.EnergyNetwork(net, moments, sp.denoise.SquaredDistance())
    return sp.ScorePrior(flow(denoiser, moments).flow, sp.EnergyDensity())


ROUND_TRIPS = {
    **PRIORS,
    "score gradient": build(mixture(), SCORE),
    "probes": build(mixture(), sp.FlowDensity(sp.Hutchinson(3, seed=5))),
    "bound": build(mixture(), sp.BoundDensity(8, seed=2)),
    "energy": energy(),
    "shared covariance": flow(
        sp.denoise.GaussianMixture.shared(
            jnp.array([0.5, 0.5]), jnp.array([[0.0, 1.0], [2.0, 3.0]]), jnp.eye(2)
        )
    ),
    "Fourier moments, Heun in arctan time": flow(
        stationary(), solver=sp.FixedGrid(3, ArctanTime(1 / 3), HEUN)
    ),
    "U-Net": flow(unet(), stationary().moments(), solver=sp.FixedGrid(2, PowerTime())),
    "multistep": flow(mixture(), solver=sp.Multistep(5, ArctanTime(0.7))),
    "adaptive": flow(mixture(), solver=sp.Adaptive(1e-3, 1e-3, LogRatioTime(0.1, 0.7))),
    "rescaled": flow(*moved()),
    "noise prediction": flow(noise_prediction(), mixture().moments()),
    "discrete schedule": flow(
        eqx.tree_at(
            lambda d: d.schedule, noise_prediction(), Discrete(jnp.geomspace(0.999, 1e-3, 50))
        ),
        mixture().moments(),
    ),
    "calibrated": flow(
        Calibrated(mixture(), jnp.array([0.1, 1.0]), jnp.ones((2, 2)), 1.0), mixture().moments()
    ),
    "smoothed": flow(
        Smoothed(mixture(), 0.5, jnp.array([[1.0, -2.0], [-1.0, 2.0]])), mixture().moments()
    ),
    "subspace": flow(
        sp.denoise.Subspace(mixture(), separable(), (1, 6)), separable(), solver=sp.FixedGrid(4)
    ),
    "conditioned": flow(
        Conditioned(
            sp.denoise.Network(
                ResidualMLP((2,), width=4, num_blocks=1, context_size=3, key=jax.random.key(0)),
                mixture().moments(),
            ),
            jnp.array([1.0, 2.0, 3.0]),
        ),
        mixture().moments(),
    ),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_prior_comes_back_bit_for_bit(tmp_path, name):
    prior = ROUND_TRIPS[name]
    sp.save(tmp_path / "prior", prior)
    again = sp.load(tmp_path / "prior")
    assert eqx.tree_equal((again.flow, again.density), (prior.flow, prior.density))
    assert jax.tree.structure(again) == jax.tree.structure(prior)
    x = 0.3 * jnp.arange(2 * prior.flow.moments.size, dtype=float).reshape(2, *prior.event_shape)
    assert jnp.array_equal(again.log_prob(x), prior.log_prob(x))


def test_metadata_come_back(tmp_path):
    metadata = {"licence": "CC BY 4.0", "bits": [2.2, 0.1], "name": "Ångström"}
    sp.save(tmp_path / "prior", PRIORS["exact"], metadata=metadata)
    assert sp.load_metadata(tmp_path / "prior") == metadata


def test_a_prior_at_another_pixel_scale_is_refused(tmp_path):
    """The shapes agree, so that nothing else would."""
    metadata = {"pixel_micro_arcseconds": 4.0, "units": "z", "axes": ["row", "col"], "whole": True}
    path = tmp_path / "prior"
    sp.save(path, PRIORS["exact"], metadata=metadata)
    radians = 4.0 * np.float32(np.pi / 180 / 3600 / 1e6)
    rounded = float(radians * 180 * 3600 * 1e6 / np.pi)
    assert rounded != 4.0
    for expect in ({}, metadata, {"pixel_micro_arcseconds": rounded}, {"axes": ("row", "col")}):
        assert repr(sp.load(path, expect=expect)) == repr(PRIORS["exact"])
    for key, value, stored in (
        ("pixel_micro_arcseconds", 5.0, "4.0"),
        ("pixel_micro_arcseconds", 4.00001, "4.0"),
        ("pixel_micro_arcseconds", "4.0", "4.0"),
        ("units", "Jy", "'z'"),
        ("whole", 1.0000001, "True"),
    ):
        match = f"asks for {key} = {value!r}, but the prior {path} was saved with {stored}: take"
        with pytest.raises(ValueError, match=re.escape(match)):
            sp.load(path, expect={key: value})
    with pytest.raises(ValueError, match=r"pixel_micro_arcseconds = 4.0, of which .* say nothing"):
        sp.load("digits", expect={"pixel_micro_arcseconds": 4.0})
    with pytest.raises(TypeError, match="expect must be plain JSON"):
        sp.load(path, expect={"pixel_micro_arcseconds": jnp.array(4.0)})


def test_strided_arrays_come_back(tmp_path):
    # safetensors 0.8.0 writes the memory of a transposed array as if it were contiguous.
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    basis = sp.gaussian.Eigenbasis(jnp.asarray(vectors).T)
    prior = flow(Gaussian(sp.Moments(jnp.zeros(3), jnp.ones(3), basis)))
    sp.save(tmp_path / "prior", prior)
    again = sp.load(tmp_path / "prior")
    assert jnp.array_equal(again.flow.moments.basis.vectors, vectors.T)


def test_a_file_from_before_an_optional_field_is_read(tmp_path):
    means = jnp.array([[-1.0, 0.0], [2.0, 1.0]])
    clean = GaussianMixture.diagonal(jnp.array([0.4, 0.6]), means, 0.2)
    sp.save(tmp_path / "prior", flow(clean))
    edit(tmp_path / "prior", lambda c: c["prior"]["flow"]["denoiser"].pop("shared_covariance"))
    again = sp.load(tmp_path / "prior").flow.denoiser
    assert not again.shared_covariance
    np.testing.assert_allclose(again(means[0], 0.3), clean(means[0], 0.3), rtol=1e-6)


def test_the_digits_prior_is_the_one_documented():
    prior, images = sp.load("digits"), sp.load_images("digits")
    assert images.shape == (180, 8, 8)
    assert images.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(prior)} == {jnp.dtype("float32")}
    key_grey, key_noise = jax.random.split(jax.random.key(0))
    x = images + jax.random.uniform(key_grey, images.shape, jnp.float32)
    x += prior.sigma_min * jax.random.normal(key_noise, images.shape, jnp.float32)
    bits = -np.asarray(prior.log_prob(x[:60])) / 64 / np.log(2)
    assert abs(bits.mean() - 2.222) < 5 * bits.std(ddof=1) / np.sqrt(len(bits))
    # The same images upside down are not digits.
    assert -float(prior.log_prob(x[:60, ::-1]).mean()) / 64 / np.log(2) > 2.5
    assert sp.load_metadata("digits")["training_data_licence"] == "CC BY 4.0"


def test_the_digits_are_small_enough_to_ship():
    folder = Path(sp.io.__file__).parents[1] / "weights" / "digits"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3e6


@pytest.fixture
def saved(tmp_path):
    sp.save(tmp_path / "prior", PRIORS["network"])
    return tmp_path / "prior"


def edit(folder, change, *, resign=True):
    """Apply `change(config)`, and give the altered section a new sum."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    if resign:
        text = json.dumps(config["prior"], sort_keys=True, separators=(",", ":"))
        config["sha256"]["prior"] = hashlib.sha256(text.encode()).hexdigest()
        data = (folder / "model.safetensors").read_bytes()
        config["sha256"]["arrays"] = hashlib.sha256(data).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def edit_arrays(folder, change):
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")
    edit(folder, lambda config: None)


def cut(file, keep):
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


WEIGHT = "flow.denoiser.net.first.weight"
DAMAGE = {
    "arrays cut short": (
        lambda f: cut(f / "model.safetensors", 0.5),
        r"model\.safetensors cannot be read .*truncated.*copy the folder again",
    ),
    "arrays altered": (
        lambda f: flip(f / "model.safetensors"),
        r"model\.safetensors was altered.*SHA-256",
    ),
    "arrays foreign": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04K\x01."),
        r"model\.safetensors cannot be read",
    ),
    "config cut short": (
        lambda f: cut(f / "config.json", 0.5),
        r"config\.json cannot be read .*truncated",
    ),
    "config altered": (
        lambda f: edit(f, lambda c: c["prior"]["flow"].update(sigma_min=0.2), resign=False),
        r"config\.json was altered: its section 'prior'",
    ),
    "config foreign": (
        lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
        r"config\.json is not the config of a prior saved by scoreprior\.save",
    ),
    "config not an object": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config\.json is not the config of a prior",
    ),
    "wrong version": (
        lambda f: edit(f, lambda c: c.update(version=99)),
        r"format version 99, and this scoreprior reads version 1: upgrade",
    ),
    "key missing": (
        lambda f: edit(f, lambda c: c.pop("metadata")),
        r"config\.json lacks the key 'metadata'",
    ),
    "field missing": (
        lambda f: edit(f, lambda c: c["prior"]["flow"].pop("sigma_max")),
        r"flow, a Flow, has a missing or unknown key 'sigma_max'",
    ),
    "part missing": (
        lambda f: edit(f, lambda c: c["prior"].pop("density")),
        r"must have the keys 'flow' and 'density'",
    ),
    "part of an unknown kind": (
        lambda f: edit(f, lambda c: c["prior"]["density"].update(kind="os.system")),
        r"density is of kind 'os\.system', which this version of scoreprior does not know",
    ),
    "part in the wrong place": (
        lambda f: edit(f, lambda c: c["prior"].update(density={"kind": "LogTime"})),
        r"density must be a density policy, got LogTime",
    ),
    "impossible value": (
        lambda f: edit(f, lambda c: c["prior"]["flow"].update(sigma_min=-1)),
        r"flow does not make a Flow: sigma_min must be a positive finite number, got -1",
    ),
    "unknown network": (
        lambda f: edit(
            f, lambda c: c["prior"]["flow"]["denoiser"]["net"]["network"].update(name="Evil")
        ),
        r"flow\.denoiser\.net does not make a network: config must name one of",
    ),
    "array missing": (
        lambda f: edit_arrays(f, lambda a: a.pop(WEIGHT)),
        rf"the array '{WEIGHT}' is missing",
    ),
    "array of a wrong shape": (
        lambda f: edit_arrays(f, lambda a: a.update({WEIGHT: a[WEIGHT][:-1].copy()})),
        rf"the array '{WEIGHT}' must have shape \(8, 2\), got \(7, 2\)",
    ),
    "array too many": (
        lambda f: edit_arrays(f, lambda a: a.update(stray=np.zeros(2))),
        r"the array 'stray' belongs to no part",
    ),
}


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_says_what_is_wrong(saved, name):
    damage, message = DAMAGE[name]
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        sp.load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"{re.escape(file)} cannot be read \(No such file"
    ):
        sp.load(saved)


def test_nothing_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"digit does not exist.*bundled one, \['digits', 'radio'\]"
    ):
        sp.load(tmp_path / "digit")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file is a file: give the folder"):
        sp.load(tmp_path / "file")
    with pytest.raises(ValueError, match=r"name must be one of \['digits', 'radio'\], got 'faces'"):
        sp.load_images("faces")


class Halved(AbstractTime):
    def time(self, sigma):
        return sigma / 2

    def sigma(self, time):
        return 2 * time


def not_ours():
    return sp.denoise.Network(lambda x, log_sigma, context: x, mixture().moments())


def altered():
    return eqx.tree_at(lambda d: d.net.last.weight, network(), jnp.zeros((2, 9)))


UNSUITABLE = {
    "network": (
        lambda: flow(not_ours(), mixture().moments()),
        r"flow\.denoiser\.net is a function",
    ),
    "solver": (
        lambda: flow(mixture(), solver=sp.FixedGrid(2, Halved())),
        r"flow\.solver\.time is a Halved, which cannot be saved.*build the prior around it again",
    ),
    "altered": (lambda: flow(altered(), mixture().moments()), r"net is a ResidualMLP altered"),
}


@pytest.mark.parametrize("name", UNSUITABLE)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path, name):
    make, message = UNSUITABLE[name]
    with pytest.raises(TypeError, match=message):
        sp.save(tmp_path / "prior", make())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("as_user")
def test_arguments_that_are_not_priors_or_json(tmp_path):
    with pytest.raises(TypeError, match="prior must be a ScorePrior, got Flow"):
        sp.save(tmp_path / "prior", PRIORS["exact"].flow)
    with pytest.raises(TypeError, match="metadata must be plain JSON"):
        sp.save(tmp_path / "prior", PRIORS["exact"], metadata={"when": object()})
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), PRIORS["exact"])
    stacked = promote_batch_shape(stacked)
    with pytest.raises(ValueError, match=r"prior must have no batch shape, got \(3,\)"):
        sp.save(tmp_path / "prior", stacked)
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_a_prior_and_nothing_else(tmp_path):
    path = tmp_path / "prior"
    sp.save(path, PRIORS["exact"])
    sp.save(path, PRIORS["network"])
    assert repr(sp.load(path)) == repr(PRIORS["network"])
    assert [file.name for file in tmp_path.iterdir()] == ["prior"]
    shutil.rmtree(path)
    path.mkdir()
    (path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="prior exists and is not a saved prior"):
        sp.save(path, PRIORS["exact"])
    assert (path / "thesis.tex").read_text() == "x"


def test_a_failed_write_leaves_the_earlier_prior(tmp_path, monkeypatch):
    path = tmp_path / "prior"
    sp.save(path, PRIORS["exact"])
    monkeypatch.setattr(sp.io.files, "write_tensors", lambda arrays: b"\x00" * 8)
    with pytest.raises(ValueError, match="cannot be read"):
        sp.save(path, PRIORS["network"])
    assert repr(sp.load(path)) == repr(PRIORS["exact"])
    assert [file.name for file in tmp_path.iterdir()] == ["prior"]


@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failed_exchange_leaves_the_earlier_prior(tmp_path, monkeypatch, when, failure):
    path, rename, calls = tmp_path / "prior", Path.rename, []
    sp.save(path, PRIORS["exact"])

    def fail(self, target):
        calls.append(target)
        if len(calls) == when:
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(failure):
        sp.save(path, PRIORS["network"])
    assert repr(sp.load(path)) == repr(PRIORS["exact"])
    assert [file.name for file in tmp_path.iterdir()] == ["prior"]


def test_rounding_is_announced(saved):
    with jax.enable_x64(False), pytest.warns(UserWarning, match="float64 and are rounded"):
        sp.load(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sp.load(saved)
