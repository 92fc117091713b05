"""Visibilities: files, flags, averages, closures."""

import numpy as np
import pytest

from arrays import SKY, observe, visibility, with_gains
from scoreprior.interferometry import (
    Visibilities,
    add_systematic,
    average_scans,
    average_seconds,
    closure_phases,
    flag,
    log_closure_amplitudes,
    read_eht_csv,
    rescale_zero_baselines,
    total_flux,
    trivial_closure_phases,
)
from stats import assert_cov, assert_mean

HEADER = "#SRC:M87\n#time(UTC),T1,T2,U(lambda),V(lambda),Iamp(Jy),Iphase(d),Isigma(Jy)\n"
LINES = "0.5,AA,PV,-4e9,-4.5e9,0.2,90.0,0.004\n0.75,AA,LM,3e9,1e9,0.1,-30.0,0.01\n"
FIVE = ["A", "B", "C", "D", "E"]


def written(tmp_path, text):
    path = tmp_path / "visibilities.csv"
    path.write_bytes(text.encode())
    return path


# Files


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_file_is_read(tmp_path, newline):
    data = read_eht_csv(written(tmp_path, (HEADER + LINES).replace("\n", newline)))
    assert len(data) == 2
    assert data.stations == ["AA", "LM", "PV"]
    np.testing.assert_array_equal(data.time, [0.5, 0.75])
    np.testing.assert_allclose(data.vis, [0.2j, 0.1 * np.exp(-1j * np.pi / 6)], atol=1e-16)
    # The file's transform has the other sign.
    np.testing.assert_array_equal(data.u, [4e9, -3e9])
    np.testing.assert_array_equal(data.v, [4.5e9, -1e9])
    np.testing.assert_array_equal(data.sigma, [0.004, 0.01])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected lines of 8 values, found none"),
        (HEADER, "expected lines of 8 values, found none"),
        (LINES, "line 1: expected a comment that names the columns"),
        ("SIMPLE  =  T / a FITS file\n", "line 1: expected a comment that names the columns"),
        (HEADER.replace("Isigma(Jy)", "Qsigma(Jy)"), "line 2: expected the columns time.*Qsigma"),
        (HEADER.replace(",Isigma(Jy)", ""), "line 2: expected the columns"),
        (HEADER + LINES + "0.8,AA,LM,3e9,1e9,0.1,-30\n", "line 5: expected 8 values.*found 7"),
        (HEADER + LINES.replace("0.2", "big"), "line 3: expected a number as Iamp.*'big'"),
        (HEADER + LINES.replace("0.2", "nan"), "line 3: expected a finite Iamp.*found nan"),
        (HEADER + LINES.replace("-30.0", "inf"), "line 4: expected a finite Iphase.*found inf"),
        (HEADER + LINES.replace("0.01", "0.0"), "line 4: expected a positive Isigma.*found 0.0"),
        (HEADER + LINES.replace("0.01", "-1"), "line 4: expected a positive Isigma.*found -1"),
        (HEADER + LINES.replace("0.2", "-0.2"), "line 3: expected Iamp.*at least 0, found -0.2"),
        (HEADER + LINES.replace("PV", ""), "line 3: expected the code of a station as T2"),
        (HEADER + LINES.replace("PV", "AA"), "station2 must be another station.*AA in row 0"),
    ],
)
def test_a_file_of_another_format_says_where_and_what(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_eht_csv(written(tmp_path, text))


def test_a_table_says_what_is_wrong_with_it(as_user):
    good = {"time": [0.0], "station1": ["A"], "station2": ["B"], "u": [1.0], "v": [1.0]}
    good |= {"vis": [1j], "sigma": [1.0]}
    assert len(Visibilities(**good)) == 1
    for name, value, message in [
        ("sigma", [0.0], "sigma must be positive.*got 0.0 in row 0"),
        ("vis", [complex(np.nan, 1)], r"vis must be finite, got \(nan"),
        ("u", [np.inf], "u must be finite, got inf in row 0"),
        ("v", [1.0, 2.0], r"v must have one entry per visibility, shape \(1,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            Visibilities(**{**good, name: value})


def test_a_table_cannot_be_written_to():
    data = observe(FIVE, [0.0])
    with pytest.raises(ValueError, match="read-only"):
        data.sigma[0] = 0.0


def test_what_a_table_says():
    data = observe(["A", "B", "C"], [1.0, 2.0])
    assert repr(data).startswith("Visibilities(6 on 3 baselines of A B C; 2 times from 1.000 to 2")
    assert [line.split()[:2] for line in data.summary().splitlines()[2:]] == [
        ["A-B", "2"],
        ["A-C", "2"],
        ["B-C", "2"],
    ]


def test_the_index_of_stations():
    data = observe(FIVE, [1.0], turn=True)
    names = np.array(data.stations)[data.station_index]
    np.testing.assert_array_equal(names, np.stack([data.station1, data.station2], 1))


# Flags and averages


def test_flags():
    data = observe(FIVE, [1.0, 2.0, 3.0])
    assert flag(data, stations=["A"]).stations == ["B", "C", "D", "E"]
    assert ("A", "B") not in flag(data, baselines=[("B", "A")]).baselines
    assert len(flag(data, baselines=[("B", "A")])) == 27
    assert set(flag(data, times=(1.5, 2.5)).time) == {2.0}
    cut = np.median(data.snr)
    np.testing.assert_array_equal(flag(data, min_snr=cut).vis, data.vis[data.snr >= cut])
    for options, message in [
        ({"stations": ["Z"]}, "stations must be among.*got 'Z'"),
        ({"baselines": [("A", "Z")]}, r"baselines must be among.*got \('A', 'Z'\)"),
        ({"min_snr": 1e9}, "flags must leave some visibilities, got none of 30"),
    ]:
        with pytest.raises(ValueError, match=message):
            flag(data, **options)


def test_averages_over_scans_are_weighted_and_keep_the_noise_right():
    seconds = np.array([0.0, 10, 20, 30, 400, 410, 420])
    sigma = np.exp(np.random.default_rng(3).normal(size=7 * 10))
    data = observe(FIVE, seconds / 3600, sigma=sigma, turn=True)
    mean = average_scans(data, gap=60.0)
    np.testing.assert_allclose(np.unique(mean.time) * 3600, [15.0, 410.0])
    assert len(mean) == 20
    for row in range(len(mean)):
        pair = (str(mean.station1[row]), str(mean.station2[row]))
        assert pair == tuple(sorted(pair))
        first = mean.time[row] * 3600 < 100
        part = data[data.on(pair) & ((data.time * 3600 < 100) == first)]
        weight = part.sigma**-2
        turned = part.station1 != pair[0]
        vis = np.where(turned, part.vis.conj(), part.vis)
        np.testing.assert_allclose(mean.vis[row], np.average(vis, weights=weight))
        for name in ("u", "v"):
            sign = np.where(turned, -1, 1)
            expected = np.average(sign * getattr(part, name), weights=weight)
            np.testing.assert_allclose(getattr(mean, name)[row], expected)
        np.testing.assert_allclose(mean.sigma[row], weight.sum() ** -0.5)


def test_averages_over_seconds_begin_at_the_first_time():
    # 10 s printed with eight decimals of an hour, as in files.
    time = np.round(np.arange(12) * 10 / 3600, 8)
    mean = average_seconds(observe(FIVE, time), 30.0)
    np.testing.assert_allclose(np.unique(mean.time) * 3600, [10, 40, 70, 100], atol=1e-3)
    np.testing.assert_allclose(mean.sigma, 0.01 / np.sqrt(3))
    with pytest.raises(ValueError, match="seconds must be a positive finite number, got 0"):
        average_seconds(mean, 0.0)


def test_the_noise_of_an_average_is_that_of_its_draws():
    sigma = np.tile([0.01, 0.03, 0.05], 4000)
    time = (np.arange(12_000) * 10 + 100 * (np.arange(12_000) // 3)) / 3600
    data = observe(["A", "B"], time, sigma=sigma, sky=[(1.0, 0.0, 0.0)])
    mean = average_scans(data, gap=60.0)
    assert len(mean) == 4000
    score = (mean.vis - 1.0) / mean.sigma
    both = np.concatenate([score.real, score.imag])
    assert_mean(both[:, None], 0.0, bias=0.1)
    assert_cov(both[:, None], 1.0, bias=0.15)


def test_an_error_budget_adds_in_quadrature():
    data = observe(FIVE, [0.0])
    grown = add_systematic(data, 0.1)
    np.testing.assert_allclose(grown.sigma**2, data.sigma**2 + 0.01 * data.amplitude**2)
    np.testing.assert_array_equal(add_systematic(data, 0.0).sigma, data.sigma)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got 2"):
        add_systematic(data, 2.0)


def test_total_flux_has_no_bias_of_noise():
    # At an SNR of 2 amplitudes are 12 % too large.
    data = observe(["Ax", "Bx", "C"], np.arange(20_000) / 3600, sigma=0.5)
    flux = total_flux(data, zero_baseline=1e7)
    np.testing.assert_allclose(flux.standard_error, 0.5 / np.sqrt(20_000))
    assert abs(flux.value - 1.0) < 5 * flux.standard_error * 1.1  # the square, at an SNR of 2
    assert data.amplitude[data.on(("Ax", "Bx"))].mean() > 1.1
    with pytest.raises(ValueError, match="zero_baseline must be above the shortest baseline"):
        total_flux(data, zero_baseline=1.0)
    halved = rescale_zero_baselines(data, flux.value / 2, zero_baseline=1e7)
    short = data.on(("Ax", "Bx"))
    np.testing.assert_allclose(halved.vis[short], data.vis[short] / 2)
    np.testing.assert_allclose(halved.sigma[short], data.sigma[short] / 2)
    np.testing.assert_array_equal(halved.vis[~short], data.vis[~short])


# Closures


@pytest.mark.parametrize("closures_of", [closure_phases, log_closure_amplitudes])
@pytest.mark.parametrize("turn", [False, True])
def test_no_gain_changes_a_closure(closures_of, turn):
    data = observe(FIVE, [0.0, 1.0], turn=turn)
    closures = closures_of(data)
    gained = with_gains(data)
    assert np.abs(np.angle(gained.vis / data.vis)).max() > 1  # the gains are not small
    difference = closures(gained.vis) - closures.value
    if closures.is_phase:
        difference = np.angle(np.exp(1j * difference))
    np.testing.assert_allclose(difference, 0.0, atol=1e-12)
    # Nor their noise, which gains scale as they do the amplitude.
    other = closures_of(gained)
    np.testing.assert_allclose(other.covariance, closures.covariance, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("num", [3, 4, 5, 6, 7, 8])
def test_a_set_is_minimal(num):
    data = observe([f"S{k}" for k in range(num)], [0.0, 2.0], turn=True)
    phases = closure_phases(data)
    assert len(phases) == 2 * (num - 1) * (num - 2) // 2
    assert np.linalg.matrix_rank(phases.design) == len(phases)
    if num > 3:
        amplitudes = log_closure_amplitudes(data)
        assert len(amplitudes) == 2 * num * (num - 3) // 2
        assert np.linalg.matrix_rank(amplitudes.design) == len(amplitudes)
    else:
        with pytest.raises(ValueError, match="a quadrangle all of whose baselines"):
            log_closure_amplitudes(data)


def test_a_set_of_an_array_with_holes_is_minimal():
    # 8 baselines between 5 stations have 8 - 5 + 1 independent cycles, and triangles span them.
    data = observe(FIVE, [0.0], drop=[("A", "B"), ("C", "D")])
    phases = closure_phases(data)
    triangles = {tuple(names) for names in phases.stations.tolist()}
    assert all(not {"A", "B"} <= set(t) and not {"C", "D"} <= set(t) for t in triangles)
    assert len(phases) == np.linalg.matrix_rank(phases.design) == 4


def test_a_closure_is_what_its_stations_say():
    data = observe(FIVE, [0.0], turn=True, noise=False)
    rows = {}
    for row, (a, b) in enumerate(zip(data.station1.tolist(), data.station2.tolist(), strict=True)):
        rows[a, b], rows[b, a] = data.vis[row], np.conj(data.vis[row])
    phases = closure_phases(data)
    for (a, b, c), value in zip(phases.stations.tolist(), phases.value, strict=True):
        product = rows[a, b] * rows[b, c] * rows[c, a]
        np.testing.assert_allclose(np.exp(1j * value), product / abs(product), atol=1e-12)
    assert np.abs(phases.value).max() > 0.1
    amplitudes = log_closure_amplitudes(data)
    for (a, b, c, d), value in zip(amplitudes.stations.tolist(), amplitudes.value, strict=True):
        ratio = rows[a, b] * rows[c, d] / (rows[a, c] * rows[b, d])
        np.testing.assert_allclose(value, np.log(abs(ratio)), atol=1e-12)
    assert phases.chi_squared(data.vis) == 0


def test_the_design_acts_on_phases_and_log_amplitudes():
    data = observe(FIVE, [0.0, 1.0], turn=True)
    vis = np.stack([data.vis, data.vis[::-1]])
    phases, amplitudes = closure_phases(data), log_closure_amplitudes(data)
    direct = np.angle(vis) @ phases.design.T
    np.testing.assert_allclose(np.exp(1j * phases(vis)), np.exp(1j * direct), atol=1e-12)
    np.testing.assert_allclose(amplitudes(vis), np.log(np.abs(vis)) @ amplitudes.design.T)
    assert set(np.unique(phases.design)) == {-1, 0, 1}
    with pytest.raises(ValueError, match="vis must end in the 20 visibilities"):
        phases(data.vis[:3])


@pytest.mark.parametrize("closures_of", [closure_phases, log_closure_amplitudes])
def test_the_covariance_is_that_of_noisy_draws(closures_of):
    truth = observe(["A", "B", "C", "D"], [0.0, 1.0], noise=False)
    rng = np.random.default_rng(0)
    truth = truth.replace(sigma=truth.amplitude / rng.uniform(60, 200, size=len(truth)))
    closures = closures_of(truth)
    noise = rng.normal(size=(40_000, len(truth), 2)) @ [1, 1j]
    draws = closures(truth.vis + truth.sigma * noise) - closures.value
    sd = closures.sd
    assert_mean(draws / sd, 0.0)
    correlation = closures.covariance / np.outer(sd, sd)
    assert np.abs(correlation - np.eye(len(sd))).max() > 0.2
    assert_cov(draws / sd, correlation)
    np.testing.assert_allclose(
        closures.covariance, closures.design @ np.diag(truth.snr**-2.0) @ closures.design.T
    )


def test_some_closures_keep_their_covariance():
    closures = closure_phases(observe(FIVE, [0.0, 1.0, 2.0]))
    mask = np.random.default_rng(1).random(len(closures)) < 0.5
    some = closures[mask]
    np.testing.assert_allclose(some.covariance, closures.covariance[np.ix_(mask, mask)], atol=1e-18)
    np.testing.assert_array_equal(some.value, closures.value[mask])
    np.testing.assert_array_equal(some.stations, closures.stations[mask])


def test_chi_squared_is_that_of_the_covariance():
    data = observe(FIVE, [0.0, 1.0])
    model = visibility(data.u, data.v, SKY)
    for closures in (closure_phases(data)[1:], log_closure_amplitudes(data)):
        residual = closures.value - closures(model)
        direct = residual @ np.linalg.inv(closures.covariance) @ residual
        np.testing.assert_allclose(closures.chi_squared(model), direct)


def test_any_minimal_set_has_the_same_information():
    data = observe(FIVE, [0.0, 1.0], sigma=np.exp(np.random.default_rng(0).normal(-5, 1, 20)))
    model = 1.1 * visibility(data.u, data.v, SKY[:2])
    for closures_of in (closure_phases, log_closure_amplitudes):
        # A zero baseline that is none: closures are taken in another order.
        one, two = closures_of(data), closures_of(data, zero_baseline=3e9)
        assert not np.array_equal(one.stations, two.stations)
        np.testing.assert_allclose(one.chi_squared(data.vis), 0.0, atol=1e-12)
        residual = one.value - one(model), two.value - two(model)
        if one.is_phase:  # Without wraps, residuals of one set are combinations of the other's.
            small = data.vis * np.exp(0.01j * np.arange(20))
            residual = one(small) - one.value, two(small) - two.value
        chi = [
            r @ np.linalg.solve(c.covariance, r) for r, c in zip(residual, (one, two), strict=True)
        ]
        np.testing.assert_allclose(*chi, rtol=1e-8)


def test_trivial_triangles_come_last_and_are_near_zero():
    # Ax-Bx-Cy and Ax-Bx-E are the least noisy here, and would be taken before others.
    sigma = np.where(np.isin(np.arange(10), [0, 1, 3, 4, 6]), 1e-4, 2e-3)
    sigma = np.tile(sigma, 2)
    data = observe(["Ax", "Bx", "Cy", "Dy", "E"], [0.0, 1.0], sigma=sigma)
    phases = closure_phases(data, zero_baseline=1e7)
    far = phases[phases.shortest >= 1e7]
    flagged = closure_phases(flag(data, baselines=[("Ax", "Bx"), ("Cy", "Dy")]))
    assert len(phases) == 12
    assert len(far) == len(flagged) < 12
    np.testing.assert_array_equal(far.stations, flagged.stations)
    np.testing.assert_allclose(far.covariance, flagged.covariance, atol=1e-16)
    trivial = trivial_closure_phases(data, zero_baseline=1e7)
    assert (trivial.shortest < 1e7).all()
    ones = np.ones(len(data), complex)
    assert trivial.chi_squared(ones) < len(trivial) + 5 * np.sqrt(2 * len(trivial))
    assert far.chi_squared(ones) > 100 * len(far)
    with pytest.raises(ValueError, match="a triangle with a zero baseline all of whose"):
        trivial_closure_phases(data, zero_baseline=1.0)


def test_closures_say_what_they_cannot_use():
    data = observe(FIVE, [0.0])
    with pytest.raises(ValueError, match="got two of A-B at 0.0 h .rows 0 and 10.: average"):
        closure_phases(data[[*range(10), 0]])
    with pytest.raises(ValueError, match="no amplitude of zero for closures, got one in row 1"):
        closure_phases(data.replace(vis=data.vis * (np.arange(10) != 1)))
    with pytest.raises(ValueError, match="a triangle all of whose baselines were seen at one time"):
        closure_phases(data.replace(time=np.arange(10.0)))
    assert repr(closure_phases(data)).startswith("Closures(6 closure phases at 1 times, median sd")
    assert "log closure amplitudes" in repr(log_closure_amplitudes(data))
