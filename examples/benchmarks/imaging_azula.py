"""PSNR of posterior means of blurred digits by azula and by `Guided`, with one network.

    python examples/benchmarks/imaging_azula.py [--quick] [--digits 20]

azula (github.com/francois-rozet/azula; the extra `azula`) is a PyTorch package of denoisers and
guidance. The bundled
network is rewritten in PyTorch with its weights; that the two denoisers agree to 1e-5, relative to
the largest of pixels and 1, is checked first. Both sample the law of the model, which has the noise
of `sigma_min`, down the same 100 levels, one evaluation each, from the problem `blur` of
`imaging.py` at both noise levels; 64 draws. azula's sampler is DDPM; `Guided` has its own, and DDPM
too. Settings are the same in both packages, and none is chosen; linear systems of azula are solved
by its default, GMRES, for `MMPS`, whose conjugate gradients lose draws, and by ten conjugate
gradients for `DiffPIR`. Draws that are not finite are left out of the mean, and counted. The
setting of `DPS` is the step of `Guided`; azula takes one norm over a batch, so that its `zeta` is
multiplied by the square root of the number of draws. Differences are those on the same digits.
"""

import dataclasses
import time
import warnings
from functools import partial
from typing import Any

import imaging
import jax
import jax.numpy as jnp
import numpy as np
import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.guidance import DiffPIRDenoiser, DPSSampler, MMPSDenoiser
from azula.linalg.covariance import IsotropicCovariance
from azula.noise import VESchedule
from azula.sample import DDPMSampler
from common import Progress, arguments, digits_flow, show, write

import scoreprior as sp
from scoreprior import check
from scoreprior.denoise import Noised
from scoreprior.guide import DPS, MMPS, DiffPIR
from scoreprior.sample import Ancestral

PACKAGES = ("azula", "`Guided`", "`Guided`, DDPM")
NUM_DRAWS, NUM_STEPS, LAST_LEVEL = 64, 100, 0.1
TOLERANCE = 1e-5
FLOW = digits_flow(jnp.float32)
LOW = LAST_LEVEL * FLOW.sigma_min
HIGH = float((FLOW.sigma_max**2 - FLOW.sigma_min**2) ** 0.5)


class Ported(Denoiser):
    """`Noised(flow.denoiser, sigma_min)` of flattened digits in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = VESchedule(LOW, HIGH)
        network = FLOW.denoiser
        self.net = jax.tree.map(_tensor, network.net)
        self.mean = _tensor(network.moments.mean).ravel()
        self.variances = _tensor(network.moments.eigenvalues).ravel()
        self.level = FLOW.sigma_min

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, **_: Any) -> DiracPosterior:
        return DiracPosterior(self.denoise(x_t, self.schedule.sigma(t)))

    def denoise(self, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """The denoised event with its noise of `sigma_min`, by the score at `hypot`."""
        sigma = torch.sqrt(r**2 + self.level**2)
        scales = torch.sqrt(self.variances + sigma**2)
        log_level = torch.log(sigma / torch.sqrt(self.variances.mean())) / 4
        output = self.network((x - self.mean) / scales, log_level)
        residual = sigma * torch.sqrt(self.variances) / scales * output
        x_hat = self.mean + self.variances / scales**2 * (x - self.mean) + residual
        return x + r**2 / sigma**2 * (x_hat - x)

    def network(self, x: torch.Tensor, log_level: torch.Tensor) -> torch.Tensor:
        """`ResidualMLP`, of many events at one level."""
        silu, linear = torch.nn.functional.silu, torch.nn.functional.linear
        condition = self.net.condition
        features = condition.features
        rates = np.geomspace(1.0, features.fastest, features.num_frequencies)
        angles = torch.tensor(rates, dtype=torch.float32) * log_level
        e = torch.cat([torch.sin(angles), torch.cos(angles)])
        for layer in (condition.first, condition.second):
            e = silu(linear(e, layer.weight, layer.bias))
        h = linear(x, self.net.first.weight, self.net.first.bias)
        for block in self.net.blocks:
            inner = torch.nn.functional.layer_norm(
                h, h.shape[-1:], block.norm.weight, block.norm.bias, block.norm.eps
            )
            inner = linear(inner, block.first.weight, block.first.bias)
            film = block.film.linear
            scale, shift = linear(e, film.weight, film.bias).chunk(2)
            inner = silu(inner * (1 + scale) + shift)
            h = h + linear(inner, block.second.weight, block.second.bias)
        return linear(silu(h), self.net.last.weight, self.net.last.bias)


def _tensor(array: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(array))


def disagreement(ported: Ported) -> float:
    """Largest difference of the two denoisers over all levels, relative to pixels and 1."""
    ours, largest = Noised(FLOW.denoiser, FLOW.sigma_min), 0.0
    for r in np.geomspace(LOW, HIGH, 9, dtype=np.float32):
        rng = np.random.default_rng(0)
        x = imaging.digits()[:32] + r * rng.standard_normal((32, 8, 8), np.float32)
        found = jax.vmap(lambda x, r=r: ours(x, r))(jnp.asarray(x)).reshape(32, 64)
        theirs = ported.denoise(torch.tensor(x.reshape(32, 64)), torch.tensor(r)).numpy()
        error = np.abs(found - theirs) / np.maximum(1, np.abs(x).max())
        largest = max(largest, float(error.max()))
    return largest


def by_azula(method: str, setting: float, noise: float, data: imaging.Data, seed: int) -> Any:
    """Draws [n, 64]."""
    torch.manual_seed(seed)
    denoiser, (A, _) = Ported(), imaging.matrices("blur")
    matrix = torch.tensor(A, dtype=torch.float32)
    y = torch.tensor(data.y, dtype=torch.float32).expand(NUM_DRAWS, -1)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x @ matrix.T

    if method == "DPS":
        ratio = (LOW / HIGH) ** (1 / NUM_STEPS)
        zeta = setting * (1 - ratio**2) * NUM_DRAWS**0.5
        sampler = DPSSampler(denoiser, y, forward, zeta, steps=NUM_STEPS, silent=True)
    elif method == "MMPS":
        cov_y = IsotropicCovariance(torch.tensor(noise**2))
        guided = MMPSDenoiser(denoiser, y, forward, cov_y, "gmres", int(setting))
        sampler = DDPMSampler(guided, steps=NUM_STEPS, silent=True)
    else:
        guided = DiffPIRDenoiser(denoiser, y, forward, noise**2, setting, "cg", 10)
        sampler = DDPMSampler(guided, steps=NUM_STEPS, silent=True)
    x = sampler.init((NUM_DRAWS, 64), denoiser.mean, denoiser.variances)
    return sampler(x).detach().numpy().astype(float)


OURS = {"DPS": DPS, "MMPS": lambda count: MMPS(int(count)), "DiffPIR": DiffPIR}
SETTINGS = [("DPS", 10.0), ("DPS", 30.0), ("MMPS", 1.0), ("MMPS", 4.0), ("DiffPIR", 1.0)]
SETTINGS.append(("DiffPIR", 8.0))


def measure(method: str, setting: float, noise: float, index: int) -> dict[str, float]:
    """PSNR of the means of both, and seconds."""
    data, row = imaging.observe("blur", noise, index), {}
    # The last of its evaluations is that of the mean that a draw is replaced by.
    half_noise = sp.Guided(OURS[method](setting), NUM_DRAWS, NUM_STEPS - 1)
    ddpm = dataclasses.replace(half_noise, sampler=Ancestral())
    draws = (
        partial(by_azula, method, setting, noise, data, index),
        partial(imaging.by_engine, half_noise, "blur", noise, data, index),
        partial(imaging.by_engine, ddpm, "blur", noise, data, index),
    )
    for package, draw in zip(PACKAGES, draws, strict=True):
        start = time.perf_counter()
        x = draw()
        row[f"{package}, seconds"] = time.perf_counter() - start
        finite = np.isfinite(x).all(1)
        row[f"{package}, lost"] = int((~finite).sum())
        row[package] = check.psnr(data.truth, x[finite].mean(0), peak=imaging.PEAK)
    return row


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "imaging_azula")
    parser.add_argument("--digits", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    error = disagreement(Ported())
    print(f"largest difference of the denoisers: {error:.1e}")
    if error > TOLERANCE:
        raise RuntimeError(f"the denoisers must agree to {TOLERANCE}, got {error}")
    progress, rows = Progress(options.output), []
    for method, setting in SETTINGS[:: 3 if options.quick else 1]:
        for noise in imaging.NOISES:
            found = [
                progress(
                    f"{method}({setting:g}), noise {noise:g}, digit {index}",
                    (NUM_DRAWS, NUM_STEPS),
                    partial(measure, method, setting, noise, index),
                )
                for index in range(2 if options.quick else options.digits)
            ]
            psnr = np.array([[row[name] for name in PACKAGES] for row in found])
            gains = psnr[:, 1:] - psnr[:, :1]
            ses = gains.std(axis=0, ddof=1) / len(gains) ** 0.5
            rows.append(
                [
                    f"{method}({setting:g})",
                    f"{noise:g}",
                    len(found),
                    *(f"{mean:.2f}" for mean in psnr.mean(0)),
                    *(sum(row[f"{name}, lost"] for row in found) for name in PACKAGES),
                    *(f"{g:+.2f} ± {se:.2f}" for g, se in zip(gains.mean(0), ses, strict=True)),
                ]
            )
    columns = ["method", "noise", "digits", *PACKAGES, *(f"{name}, lost" for name in PACKAGES)]
    columns += [f"{name} less azula" for name in PACKAGES[1:]]
    show(f"PSNR of the mean, {NUM_STEPS} evaluations a draw", columns, rows)
    write(options.output, {"disagreement": error, "rows": rows})


if __name__ == "__main__":
    main()
