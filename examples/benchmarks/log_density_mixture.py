"""Error of the log density of Gaussian mixtures, by the number of denoiser evaluations.

    python examples/benchmarks/log_density_mixture.py [--quick]

Five components in 16 dimensions with full covariances, the exact denoiser and the exact density, in
double precision. Means are `spread N(0, I)`, covariances `L L' + floor I` with the entries of `L`
from `width N(0, 1)`; then the mixture is scaled to unit mean variance. RMS errors over 256 draws
noised by sigma_min, medians over five random mixtures. CPU, some six minutes.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    BUDGETS,
    arguments,
    log_probs,
    plain_log_probs,
    rms,
    show,
    steps_within,
    with_solver,
    write,
)

from scoreprior.denoise import GaussianMixture
from scoreprior.flow import HEUN, ArctanTime, FixedGrid, Flow, LogTime, Multistep, PowerTime

SIGMA_MIN = 0.05
KINDS = {
    "wide": {"spread": 1.0, "width": 0.25, "floor": 0.25},
    "separate": {"spread": 1.0, "width": 0.1, "floor": 0.05},
    "far": {"spread": 2.0, "width": 0.15, "floor": 0.05},
}


def mixture(seed: int, *, spread: float, width: float, floor: float) -> GaussianMixture:
    """A random mixture of five components in 16 dimensions, of unit mean variance."""
    rng = np.random.default_rng(seed)
    means = spread * rng.standard_normal((5, 16))
    factors = width * rng.standard_normal((5, 16, 16))
    covariances = factors @ factors.swapaxes(1, 2) + floor * np.eye(16)
    weights = np.full(5, 0.2)
    scale = np.sqrt(np.mean(np.diagonal(covariances, 0, 1, 2)) + means.var(0).mean())
    return GaussianMixture.full(
        jnp.asarray(weights), jnp.asarray(means / scale), jnp.asarray(covariances / scale**2)
    )


def draws(law: GaussianMixture, num: int) -> jax.Array:
    """Draws of `X + SIGMA_MIN N`, [num, 16]."""
    key, key_noise = jax.random.split(jax.random.key(0))
    clean = jax.vmap(law.sample)(jax.random.split(key, num))
    return clean + SIGMA_MIN * jax.random.normal(key_noise, clean.shape)


def errors(law: GaussianMixture, num: int) -> dict[str, list[float]]:
    """RMS errors at every budget, by flow."""
    flow = Flow(law, law.moments(), sigma_min=SIGMA_MIN)
    points = draws(law, num)
    truth = jax.vmap(lambda x: law.log_prob(x, SIGMA_MIN))(points)
    default = flow.solver.time
    schemes = {
        "**default: log-ratio time, Adams-Bashforth**": flow.solver,
        "arctan time, Adams-Bashforth": Multistep(3, ArctanTime(1.0)),
        "log-ratio time, Kutta-3": FixedGrid(1, default),
        "arctan time, Kutta-3": FixedGrid(1, ArctanTime(1.0)),
        "log time, Kutta-3": FixedGrid(1, LogTime()),
        "rho = 7 time, Kutta-3": FixedGrid(1, PowerTime(7.0)),
    }
    found = {}
    for name, scheme in schemes.items():
        solvers = [steps_within(budget, scheme) for budget in BUDGETS]
        values = [log_probs(with_solver(flow, solver), points) for solver in solvers]
        found[name] = [rms(value - truth) for value in values]
    edm = FixedGrid(1, PowerTime(7.0), HEUN)
    plain = [plain_log_probs(flow, points, steps_within(b, edm)) - truth[:, None] for b in BUDGETS]
    for column, terminal in enumerate(("N(0, sigma_max^2 I)", "matched")):
        name = f"EDM: unwhitened, rho = 7 grid, Heun, terminal law {terminal}"
        found[name] = [rms(value[:, column]) for value in plain]
    return found


def main() -> None:
    """Measure, print and write."""
    options = arguments(__doc__, "log_density_mixture").parse_args()
    jax.config.update("jax_enable_x64", True)
    num, seeds = (64, range(2)) if options.quick else (256, range(5))
    results = {}
    for kind, settings in KINDS.items():
        every = []
        for seed in seeds:
            every.append(errors(mixture(seed, **settings), num))
            # Some thirty programs each: one process cannot hold all of them.
            jax.clear_caches()
        results[kind] = every
        rows = [
            [name, *map(statistics.median, zip(*[found[name] for found in every], strict=True))]
            for name in every[0]
        ]
        worst = max(found[next(iter(found))][BUDGETS.index(32)] for found in every)
        show(f"{kind}: {settings}", ["RMS error, nats", *map(str, BUDGETS)], rows)
        print(f"\nlargest error of the default at 32 evaluations: {worst:.3g}")
    write(options.output, {"kinds": KINDS, "num_points": num, "rms_error": results})


if __name__ == "__main__":
    main()
