"""The data of a scale's stages, checked before training; `make check-data` (CONFIG= for one stage).

Opens every shard's first and last record with the training code, plans the first steps, and prints for each corpus what
the run will get of it. Writes RUNS/SCALE/check-data.json; exit status 1 when something is wrong.
"""

import sys

from midasheng.config import UserError
from midasheng.data.check import check_data, write
from midasheng.train.order import command_line
from stages.index import STAGES


def main() -> int:
    """Check one stage (--config), or all three."""
    one = any(a.startswith("--config") for a in sys.argv)
    found = []
    try:
        for order in [command_line("")] if one else [command_line(f"configs/{name}.yaml") for name in STAGES]:
            found.append(check_data(order.stage))
            print(found[-1].text())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = order.runs / order.scale / "check-data.json"
    write(found, path)
    wrong = sum(len(f.errors) for f in found)
    print(f"{wrong} errors" if wrong else "nothing wrong", f"; also in {path}", sep="")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
