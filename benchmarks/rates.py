# SPDX-License-Identifier: MIT
"""Learning rates of the images, by network: how far each lowers the loss on real images.

``python benchmarks/rates.py run --data-root DIR [NETWORK ...]`` condenses with each rate and, on
the same networks and batches, with none; the table has the loss of the last iterations as a share
of that. ``... readme`` puts it into the README.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tables import README, RESULTS, markdown, with_content

from dmfast import condense
from dmfast.condense import CondenseConfig
from dmfast.devices import PRECISIONS, machine, resolve_device, versions
from dmfast.errors import InputError
from dmfast.memory import keep_freed_pages
from dmfast.presets import preset
from dmfast.runs import RunFolder

RESULT = RESULTS / "rates-cpu.json"
NETWORKS = (
    *("ConvNet", "ConvNetBN", "AlexNet", "AlexNetBN", "VGG11", "VGG11BN"),
    *("ResNet18", "ResNet18BN", "ResNet18_AP", "ResNet18BN_AP"),
)
RATES = (0.01, 0.1, 1.0, 10.0)
_NONE = 1e-12  # moves nothing
_LAST = 10  # iterations of which the loss is the mean


def measure(network: str, options: dict[str, Any]) -> dict[str, float | None]:
    """The share of the loss that is left, by rate; None where it diverges."""
    unmoved = _losses(network, _NONE, options)
    shares: dict[str, float | None] = {}
    for rate in RATES:
        try:
            moved = _losses(network, rate, options)
        except InputError as error:
            if "--lr-img" not in str(error):
                raise
            print(f"{network}, {rate:g}: {error}", flush=True)
            shares[f"{rate:g}"] = None
            continue
        shares[f"{rate:g}"] = statistics.fmean(moved) / statistics.fmean(unmoved)
        print(f"{network}, {rate:g}: {shares[f'{rate:g}']:.3f}", flush=True)
    return shares


def _losses(network: str, rate: float, options: dict[str, Any]) -> list[float]:
    """Of the last iterations."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = CondenseConfig(
            model=network, lr_img=rate, seed=0, report_every=1, out=folder, **options
        )
        condense.run(config)
        records = RunFolder(Path(folder)).read_metrics()
    return [record["loss"] for record in records if "loss" in record][-_LAST:]


def table() -> str:
    """The README's table of the result, with its command; "" where there is none."""
    if not RESULT.exists():
        return ""
    content = json.loads(RESULT.read_text())
    options = content["options"]
    rates = [f"{rate:g}" for rate in content["rates"]]
    lines = []
    for row in content["rows"]:
        chosen = f"{preset(options['dataset'], row['ipc'], model=row['network']).lr_img:g}"
        words = [
            "diverges" if (share := row["shares"][rate]) is None else f"{share:.2f}"
            for rate in rates
        ]
        shown = [f"**{w}**" if rate == chosen else w for rate, w in zip(rates, words, strict=True)]
        lines.append([row["network"], str(row["ipc"]), *shown])
    return (
        f"{markdown(['network', 'images a class', *rates], lines)}\nLoss of the last "
        f"{content['last']} of {options['iterations']} iterations, {options['batch_real']} real "
        "images a class of CIFAR-10, as a share of that of images that do not move; bold: the "
        f"preset's rate. `{content['command']}`\n"
    )


def with_table(readme: str) -> str:
    """The README with the present table between its marks."""
    return with_content(readme, "rates", table())


def _run(given: argparse.Namespace) -> None:
    options = {
        "dataset": "cifar10",
        "iterations": given.iterations,
        "batch_real": given.batch_real,
        "precision": given.precision,
    }
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    rows = known.get("rows", []) if known.get("options") == options else []
    for network in given.networks or NETWORKS:
        if (network, given.ipc) in [(row["network"], row["ipc"]) for row in rows]:
            continue
        shares = measure(network, options | {"ipc": given.ipc, "data_root": given.data_root})
        rows.append({"network": network, "ipc": given.ipc, "shares": shares})
        rows.sort(key=lambda row: (_place(row["network"]), row["ipc"]))
        content = {
            "command": "python benchmarks/rates.py run --data-root DIR --ipc N "
            f"--iterations {given.iterations} --batch-real {given.batch_real} "
            f"--precision {given.precision}",
            "options": options,
            "rates": RATES,
            "last": _LAST,
            "machine": machine(resolve_device("auto")),
            "versions": versions(),
            "rows": rows,
        }
        RESULT.write_text(json.dumps(content, indent=1) + "\n")


def _place(network: str) -> int:
    return NETWORKS.index(network) if network in NETWORKS else len(NETWORKS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="measure; what is there is not repeated")
    runner.add_argument("networks", metavar="NETWORK", nargs="*", help=", ".join(NETWORKS))
    runner.add_argument("--ipc", type=int, default=1, help="condensed images a class")
    runner.add_argument("--data-root", metavar="DIR", help="that holds cifar10/")
    runner.add_argument("--iterations", type=int, default=20)
    runner.add_argument("--batch-real", type=int, default=8)
    runner.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    commands.add_parser("readme", help="put the table into the README")
    given = parser.parse_args()
    if given.command == "run":
        keep_freed_pages()
        _run(given)
    else:
        README.write_text(with_table(README.read_text()))


if __name__ == "__main__":
    main()
