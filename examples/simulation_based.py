"""From a simulator to a checked posterior: influenza at a boarding school, 1978.

    python examples/simulation_based.py [--output influenza.png] [--quick]

Of 763 boys, the daily numbers confined to bed are those of "Influenza in a boarding school",
British Medical Journal 1, 587 (1978). The simulator is a stochastic epidemic: every boy is
susceptible, infectious or removed, with infections and recoveries drawn day by day. Nobody can
write its likelihood down.

1. Ten thousand simulations train one conditional score (`sbi.NPSE`).
2. The posterior of the outbreak, and what it predicts, in a picture.
3. Checks: calibration over simulated outbreaks, and whether the data are like simulations at all.
4. Eight outbreaks at once: scores composed (`sbi.compose`), with the evidence that they share one
   rate of infection, judged by that of simulated outbreaks that do, and with a measurement of
   another kind in a NumPyro model.

Four minutes on two cores, five of processor time.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import scoreprior as sp
from scoreprior import check, sbi

BOYS = 763
IN_BED = np.array([3, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4])
STEPS_PER_DAY = 8


def prior() -> None:
    """Rates per day: infections by one infectious boy among susceptibles, and recoveries."""
    numpyro.sample("infection", dist.LogNormal(jnp.log(1.5), 0.5))
    numpyro.sample("recovery", dist.LogNormal(jnp.log(0.5), 0.3))


def epidemic(key: jax.Array, theta: dict[str, jax.Array]) -> jax.Array:
    """Square roots of the numbers in bed on days two to fourteen, from three on the first."""
    infection, recovery = theta["infection"], theta["recovery"]

    def step(state: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple:
        healthy, ill = state
        key_ill, key_well = jax.random.split(key)
        risk = -jnp.expm1(-infection * ill / BOYS / STEPS_PER_DAY)
        caught = jax.random.binomial(key_ill, healthy, risk)
        well = jax.random.binomial(key_well, ill, -jnp.expm1(-recovery / STEPS_PER_DAY))
        return (healthy - caught, ill + caught - well), ill + caught - well

    start = (jnp.asarray(BOYS - 3.0), jnp.asarray(3.0))
    _, ill = jax.lax.scan(step, start, jax.random.split(key, 13 * STEPS_PER_DAY))
    daily = jnp.concatenate([jnp.asarray([3.0]), ill[STEPS_PER_DAY - 1 :: STEPS_PER_DAY]])
    return jnp.sqrt(daily[1:])


def draw_prior(key: jax.Array) -> dict[str, jax.Array]:
    """One draw of the parameters."""
    return sbi.Parameters.of(prior).sample(key)


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("influenza.png"))
    parser.add_argument("--quick", action="store_true", help="fewer simulations and steps")
    options = parser.parse_args()
    num_sims, num_steps, num_checks = (1000, 1000, 50) if options.quick else (10_000, 3000, 50)
    keys = iter(jax.random.split(jax.random.key(1978), 20))

    simulations = sbi.simulate(prior, epidemic, num_sims, key=next(keys))
    print(simulations)
    posterior = sbi.NPSE(prior, simulations).fit(key=next(keys), num_steps=num_steps)

    observed = jnp.sqrt(jnp.asarray(IN_BED[1:], float))
    draws = posterior.sample(next(keys), observed, 2000)
    tree = az.from_dict({"posterior": {name: np.asarray(v)[None] for name, v in draws.items()}})
    print(az.summary(tree, kind="stats"))
    reproduction = np.asarray(draws["infection"] / draws["recovery"])
    print(f"reproduction number {reproduction.mean():.2f} +- {reproduction.std():.2f}")

    predicted = jax.vmap(epidemic)(jax.random.split(next(keys), 2000), draws)
    picture(options.output, draws, np.asarray(predicted) ** 2)

    alarm = check.misspecification(observed, np.asarray(simulations.x))
    print(f"are the data like a simulation? p = {float(alarm.attrs['p_value']):.2g}")
    replicates = check.replicate(
        draw_prior,
        epidemic,
        lambda key, x: posterior.sample(key, x, 200),
        num=num_checks,
        key=next(keys),
    )
    ranks = check.sbc(replicates.truth, replicates.draws)
    print(f"calibration over {num_checks} outbreaks: p = {float(ranks.attrs['p_value']):.2g}")

    many(posterior, keys)


def many(posterior: sbi.Posterior, keys: Iterator[jax.Array]) -> None:
    """Eight outbreaks with the same rates, alone and with a clinical study of recovery."""
    engine = sp.FeynmanKac(None, num_particles=100, num_groups=2, num_steps=120)

    def simulate(key: jax.Array, theta: dict[str, jax.Array]) -> jax.Array:
        return jax.vmap(epidemic, (0, None))(jax.random.split(key, 8), theta)

    def infer(key: jax.Array, x: jax.Array, study: float | None = None, **options: bool) -> Any:
        product = sbi.compose(posterior.condition_all(x, num_pilot=128), posterior.parameters.law)

        def outbreaks(study: float | None = None) -> None:
            z = numpyro.sample("z", product)
            for name, value in posterior.parameters.from_vector(z).items():
                numpyro.deterministic(name, value)
                if name == "recovery" and study is not None:
                    numpyro.sample("study", dist.Normal(value, 0.005), obs=study)

        return sp.infer(outbreaks, engine, study, key=key, **options)

    def evidence(key: jax.Array, x: jax.Array) -> float:
        return float(infer(key, x, progress=False).sample_stats["log_evidence"])

    truth = {"infection": jnp.asarray(1.7), "recovery": jnp.asarray(0.45)}
    x = simulate(next(keys), truth)
    alone = infer(next(keys), x)
    print(az.summary(alone, var_names=list(truth), kind="stats"))
    ratio = float(alone.sample_stats["log_evidence"])
    found = {name: jnp.asarray(alone.posterior[name].values.ravel()) for name in truth}

    def draw(key: jax.Array) -> dict[str, jax.Array]:  # of the posterior: outbreaks like these
        row = jax.random.randint(key, (), 0, len(found["recovery"]))
        return {name: values[row] for name, values in found.items()}

    replicates = check.replicate(draw, simulate, evidence, num=19, key=next(keys))
    others = np.sort(replicates.draws)
    print(f"log p(x_1..8) - sum log p(x_i) = {ratio:.2f}; of 19 simulations with one rate each")
    print(f"from {others[0]:.2f} to {others[-1]:.2f}")
    alarm = check.evidence_ratio(ratio, replicates.draws)
    print(f"do the outbreaks share their rates? p = {float(alarm.attrs['p_value']):.2g}")
    other = {"infection": jnp.asarray(1.2), "recovery": jnp.asarray(0.45)}
    mixed = x.at[0].set(epidemic(next(keys), other))
    alarm = check.evidence_ratio(evidence(next(keys), mixed), replicates.draws)
    print(f"and with one of another rate of infection? p = {float(alarm.attrs['p_value']):.2g}")

    both = infer(next(keys), x, 0.452)
    print("with the study:")
    print(az.summary(both, var_names=list(truth), kind="stats"))


def picture(path: Path, draws: dict[str, jax.Array], predicted: np.ndarray) -> None:
    """The posterior and its predictions."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.scatter(draws["infection"], draws["recovery"], s=4, alpha=0.3, color="#3b6ea5")
    left.set(xlabel="infections per day", ylabel="recoveries per day", title="Posterior")
    days = np.arange(2, 15)
    low, middle, high = np.quantile(predicted, [0.05, 0.5, 0.95], axis=0)
    right.fill_between(days, low, high, alpha=0.25, color="#3b6ea5", label="90 % predicted")
    right.plot(days, middle, color="#3b6ea5", label="median")
    right.plot(days, IN_BED[1:], "o", color="black", label="in bed, 1978")
    right.set(xlabel="day", ylabel="boys in bed", title="Posterior predictions", ylim=(0, None))
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
