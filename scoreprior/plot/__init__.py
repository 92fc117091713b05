"""Pictures of posteriors over images.

Figures are made without `pyplot` and without a display: no global state, and nothing to close.
Save one with `figure.savefig("posterior.png", dpi=200)`.
"""

from scoreprior.plot.posterior import plot_posterior_images
from scoreprior.plot.residuals import Predictions, plot_residuals

__all__ = ["Predictions", "plot_posterior_images", "plot_residuals"]
