"""Laws of data that NumPyro lacks, as NumPyro distributions for observed sites.

Of model visibilities `V` and measured `closures`, an observed site reads

    numpyro.sample("phases", ClosurePhases(V, closures), obs=closures.value)

`ComplexNormal` and `PhotonCounts` are laws of single numbers, which broadcast; a law of closures is
of all of them together.
"""

from scoreprior.likelihood.closures import ClosurePhases, LogClosureAmplitudes
from scoreprior.likelihood.complex_normal import ComplexNormal
from scoreprior.likelihood.counts import PhotonCounts

__all__ = ["ClosurePhases", "ComplexNormal", "LogClosureAmplitudes", "PhotonCounts"]
