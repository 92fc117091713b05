"""Error of the log density of held-out digits, by the number of denoiser evaluations.

    python examples/benchmarks/log_density_digits.py [--quick]

The default flow, its variants (moments, time variable, method), the EDM grid with Heun's method,
and Dopri5 in the time of the variance-preserving SDE (beta from 0.1 to 20) on standardised data,
with evaluations of rejected steps counted. Every method integrates the flow of the same denoiser
from sigma_min to sigma_max, the levels of its training, in double precision; Dopri5 also to the
usual `t = 1`, where the network extrapolates, so that there its error is against its own solution
at a tolerance of 1e-8. The reference is the whitened flow with 100 RK4 steps in log sigma. CPU,
about ten minutes.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from common import (
    BUDGETS,
    PlainTime,
    arguments,
    digits_flow,
    held_out_digits,
    log_probs,
    plain_log_probs,
    rms,
    show,
    steps_within,
    vp_log_probs,
    with_solver,
    write,
)

from scoreprior.denoise import VP
from scoreprior.density import Exact
from scoreprior.flow import (
    HEUN,
    RK4,
    Adaptive,
    ArctanTime,
    FixedGrid,
    Flow,
    LogTime,
    Multistep,
    PowerTime,
)
from scoreprior.gaussian import Moments


def isotropic(moments: Moments) -> Moments:
    """The same mean, one variance."""
    return Moments(moments.mean, jnp.full_like(moments.eigenvalues, moments.eigenvalues.mean()))


def variants(flow: Flow) -> dict[str, Flow]:
    """Flows of the same denoiser, by moments, time variable and method."""
    default = flow.solver
    scale = float(jnp.sqrt(flow.moments.eigenvalues.mean()))
    round_flow = eqx.tree_at(lambda f: f.moments, flow, isotropic(flow.moments))
    return {
        "**default: dense, log-ratio time, Adams-Bashforth**": flow,
        "dense, log-ratio time, Kutta-3": with_solver(flow, FixedGrid(1, default.time)),
        "dense, log-ratio time, RK4": with_solver(flow, FixedGrid(1, default.time, RK4)),
        "dense, log-ratio time, Heun": with_solver(flow, FixedGrid(1, default.time, HEUN)),
        "dense, log time, Kutta-3": with_solver(flow, FixedGrid(1, LogTime())),
        "dense, arctan time, Kutta-3": with_solver(flow, FixedGrid(1, ArctanTime(scale))),
        "dense, rho = 7 time, Kutta-3": with_solver(flow, FixedGrid(1, PowerTime(7.0))),
        "isotropic, log-ratio time, Kutta-3": with_solver(round_flow, FixedGrid(1, default.time)),
        "isotropic, log time, Kutta-3": with_solver(round_flow, FixedGrid(1, LogTime())),
    }


@eqx.filter_jit
def dopri5(
    flow: Flow, points: jax.Array, tolerance: float, last: float
) -> tuple[jax.Array, jax.Array]:
    """Log densities for terminal laws `N(0, I)` and matched moments, and evaluations per point.

    Dopri5 evaluates six times per step tried, once at the start and once to choose the first step.
    """
    import diffrax

    solver = Adaptive(tolerance, tolerance, PlainTime(), diffrax.Dopri5(), max_steps=512)
    log_probs, num_steps = jax.vmap(lambda x: vp_log_probs(flow, x, solver, Exact(), last))(points)
    return log_probs, 6 * num_steps + 2


def _last_level(flow: Flow) -> float:
    """Noise level at `t = 1`, in data units."""
    return float(jnp.sqrt(flow.moments.eigenvalues.mean()) * VP(0.1, 20.0).level(1.0))


def evaluations_at(error: float, curve: dict[int, float]) -> float:
    """Evaluations at which `curve` (evaluations: error) reaches `error`, log-log interpolated."""
    counts, errors = np.array(list(curve)), np.array(list(curve.values()))
    return float(np.exp(np.interp(np.log(error), np.log(errors[::-1]), np.log(counts[::-1]))))


def main() -> None:
    """Measure, print and write."""
    options = arguments(__doc__, "log_density_digits").parse_args()
    jax.config.update("jax_enable_x64", True)
    flow = digits_flow(jnp.float64)
    flow = with_solver(flow, Multistep(30, flow.solver.time))
    points = held_out_digits(flow, 8 if options.quick else 64)
    reference = log_probs(with_solver(flow, FixedGrid(100, LogTime(), RK4)), points)

    errors: dict[str, dict[int, float]] = {}
    for name, variant in variants(flow).items():
        budgets = (*BUDGETS, 128) if variant is flow else BUDGETS
        errors[name] = {}
        for budget in budgets:
            solver = steps_within(budget, variant.solver)
            values = log_probs(with_solver(variant, solver), points)
            errors[name][solver.num_evaluations] = rms(values - reference)
    for column, law in enumerate(("N(0, sigma_max^2 I)", "N(m, C + sigma_max^2 I)")):
        name = f"EDM: unwhitened, rho = 7 grid, Heun, terminal {law}"
        edm = FixedGrid(1, PowerTime(7.0), HEUN)
        errors[name] = {}
        for budget in BUDGETS:
            values = plain_log_probs(flow, points, steps_within(budget, edm))[:, column]
            errors[name][budget] = rms(values - reference)

    ours = next(iter(errors.values()))
    rows = [[name, *list(curve.values())[: len(BUDGETS)]] for name, curve in errors.items()]
    show("RMS error of log p, nats, by evaluations (at most)", ["flow", *map(str, BUDGETS)], rows)
    print("\ndefault, evaluations taken: error", ours)
    best = list(
        zip(*[list(errors[n].values()) for n in errors if n.startswith("EDM")], strict=True)
    )
    ratios = [min(pair) / error for pair, error in zip(best, ours.values(), strict=False)]
    print("error of EDM (better terminal law) over ours:", dict(zip(BUDGETS, ratios, strict=True)))

    adaptive = []
    for stop, last in (("sigma_max", flow.sigma_max), ("t = 1", _last_level(flow))):
        own = dopri5(flow, points, 1e-8, last)[0]
        for tolerance in (1e-3, 1e-5):
            values, counts = dopri5(flow, points, tolerance, last)
            differences = values - (reference[:, None] if last == flow.sigma_max else own)
            for column, law in enumerate(("N(0, I)", "matched")):
                error, count = rms(differences[:, column]), float(counts.mean())
                equal = evaluations_at(error, ours)
                name = f"{tolerance:g}, to {stop}, terminal law {law}"
                adaptive.append([name, count, error, equal, count / equal])
    columns = ["Dopri5", "evaluations", "RMS error", "ours at equal error", "ratio"]
    show("Dopri5 against the default", columns, adaptive)
    results = {"num_points": len(points), "rms_error": errors, "edm_ratio": ratios}
    write(
        options.output, results | {"dopri5": [dict(zip(columns, r, strict=True)) for r in adaptive]}
    )


if __name__ == "__main__":
    main()
