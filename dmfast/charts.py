# SPDX-License-Identifier: MIT
"""Charts: of a run, and of runs beside each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

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


def save_accuracy_over_time(
    path: str | os.PathLike[str],
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    xlabel: str,
) -> None:
    """Draws test accuracies over the time that they took, with their spread, as SVG.

    Args:
        curves: by label, points of seconds, mean and standard deviation in %.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # A text file of the same bytes for the same figures, whose words are words.
    with matplotlib.rc_context({"svg.hashsalt": "dmfast", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for label, points in curves.items():
            seconds, means, spreads = zip(*points, strict=True)
            axes.errorbar(seconds, means, spreads, marker="o", markersize=3, capsize=2, label=label)
        axes.set_xscale("log")
        times = [point[0] for points in curves.values() for point in points]
        ticks = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36000: "10 h"}
        low, high = max(min(times), 1e-3) / 1.2, max(times) * 1.2
        shown = {at: words for at, words in ticks.items() if low <= at <= high}
        if len(shown) > 1:  # else matplotlib's own
            axes.set_xticks(list(shown), list(shown.values()))
            axes.minorticks_off()
        axes.set_xlim(low, high)
        axes.set_xlabel(xlabel, parse_math=False)  # a folder may be named a$b$
        axes.set_ylabel("test accuracy, %")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize=8)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
