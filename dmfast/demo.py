# SPDX-License-Identifier: MIT
"""Condenses real images and shows that training on the result works: ``python -m dmfast.demo``.

Ten images a class of scikit-learn's handwritten digits, which need no download; beside them, as
many random real images under the same training. Small enough for a minute or two on two cores:
fewer iterations, networks and epochs than the paper's.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take long
    from dmfast import cli

    cli.main("dmfast.demo")

from collections.abc import Sequence
from pathlib import Path

from . import cli, condense, evaluate
from .memory import keep_freed_pages

IPC, ITERATIONS, NETWORKS, EPOCHS = 10, 200, 3, 300


def run(out: Path) -> None:
    """Condenses, evaluates both sets and says where everything is, in folders of ``out``."""
    condensed, random = out / "condensed", out / "random"
    print(f"Condensing the digits to {IPC} images a class, {ITERATIONS} iterations.")
    condense.run(
        condense.CondenseConfig(
            dataset="digits",
            ipc=IPC,
            iterations=ITERATIONS,
            checkpoint_every=50,
            out=str(condensed),
            overwrite=True,
        )
    )
    print(
        f"\nTraining {NETWORKS} networks on the condensed images and {NETWORKS} on as many random "
        f"real ones, epochs 0 to {EPOCHS} (the published protocol: 20 networks, epochs 0 to 1000)."
    )
    ours = evaluate.run(
        evaluate.EvaluateConfig(
            set=str(condensed), networks=NETWORKS, epochs=EPOCHS, overwrite=True
        )
    )
    theirs = evaluate.run(
        evaluate.EvaluateConfig(
            baseline="random",
            dataset="digits",
            ipc=IPC,
            networks=NETWORKS,
            epochs=EPOCHS,
            out=str(random),
            overwrite=True,
        )
    )
    ours_is, theirs_is = (
        f"{result.accuracy_mean:5.1f} % +- {result.accuracy_std:.1f}" for result in (ours, theirs)
    )
    print(
        f"""
Test accuracy on the digits, mean and standard deviation over {NETWORKS} networks:
  trained on {IPC} condensed images a class:  {ours_is}
  trained on {IPC} random real ones a class:  {theirs_is}
The condensed images: {condensed / "grid.png"}
The loss:             {condensed / "loss.png"}
All the numbers:      {condensed / "evaluation.json"}, {random / "evaluation.json"}
Next: python -m dmfast.condense --help"""
    )


def _main(arguments: Sequence[str]) -> None:
    parser = cli.Parser("dmfast.demo", "Condenses the digits and trains networks on the result.")
    parser.add_argument("--out", metavar="DIR", default="runs/demo", help="folder of the results")
    keep_freed_pages()
    out = parser.parse_args(arguments).out
    if not out:
        parser.error("--out is empty: name a folder, or leave it out")
    run(Path(out))
