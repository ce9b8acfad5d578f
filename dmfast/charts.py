# SPDX-License-Identifier: MIT
"""Charts of a run, as PNG."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .files import atomic_path


def save_loss(
    path: str | os.PathLike[str], iterations: Sequence[int], losses: Sequence[float]
) -> None:
    """Draws the loss over the iterations, on a logarithmic scale."""
    # Without pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.15, 0.13, 0.82, 0.83))
    axes.set(xlabel="iteration", ylabel="loss", yscale="log")
    axes.plot(iterations, losses, linewidth=1)
    axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
