"""Are concepts fit for use, and do answers say when they are not? Organisms whose truth is known.

    python -m benchmarks.concepts                     # everything
    python -m benchmarks.concepts --only remove       # one part

Parts: ``remove`` (removal.py), ``served`` (concept_http.py), ``poison`` (poison.py) and ``domains`` (domains.py),
beside this file.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.concept_http import ask
from benchmarks.domains import warn
from benchmarks.oasst import DATA
from benchmarks.poison import find
from benchmarks.removal import remove
from benchmarks.report import Report, parser

PARTS = ("remove", "poison", "served", "domains")


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts to run")
    options.add_argument("--folder", type=Path, help="where organisms are kept; default: a folder that is removed")
    options.add_argument("--organisms", type=int, default=4, help="of persona, each with its own data")
    options.add_argument("--seeds", type=int, default=6, help="of training, for each organism of persona")
    options.add_argument("--stories", type=int, default=3, help="organisms of stories")
    options.add_argument("--subsets", type=int, default=40, help="that the validation retrains on, twice each")
    options.add_argument("--draws", type=int, default=10, help="of query sets, in and out of two kinds of data")
    options.add_argument("--data", type=Path, default=DATA, help="holds stories260k, shakespeare, oasst and em")
    options.add_argument("--processes", type=int, default=2, help="that retrain or search side by side")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.organisms, chosen.seeds, chosen.stories, chosen.processes = 1, 2, 1, 1
        chosen.subsets, chosen.draws = 4, 2
    report = Report()
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.folder or Path(scratch)
        parts: dict[str, Callable[[], None]] = {
            "remove": lambda: remove(
                report,
                folder / "remove",
                organisms=chosen.organisms,
                seeds=chosen.seeds,
                processes=chosen.processes,
                quick=chosen.quick,
            ),
            "served": lambda: ask(report, folder / "remove", subsets=chosen.subsets, quick=chosen.quick),
            "poison": lambda: find(
                report,
                folder / "poison",
                chosen.data,
                seeds=chosen.stories,
                processes=chosen.processes,
                quick=chosen.quick,
            ),
            "domains": lambda: warn(report, folder / "remove", chosen.data, draws=chosen.draws, quick=chosen.quick),
        }
        for name in PARTS:
            if name in chosen.only:
                began = time.monotonic()
                parts[name]()
                report.write(chosen.json)  # what is measured stays, whatever becomes of the next part
                print(f"{name}: {(time.monotonic() - began) / 60:.1f} min", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
