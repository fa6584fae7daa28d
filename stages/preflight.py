"""All that is checked before step 0, without training; `make preflight SCALE=7b` (CONFIG= for one stage).

Weights and what learns, plan and mix, the run folder, disk, memory, a dry forward and backward of the largest pack: by
the code that a stage's start runs. What this machine cannot tell is said; exit status 1 when something is wrong.
"""

import sys

from midasheng.config import UserError
from midasheng.train.order import command_line
from midasheng.train.preflight import preflight
from stages.index import STAGES


def main() -> int:
    """Check one stage (--config), or all three."""
    one = any(a.startswith("--config") for a in sys.argv)
    wrong = 0
    try:
        for order in [command_line("")] if one else [command_line(f"configs/{name}.yaml") for name in STAGES]:
            found = preflight(order)
            print(found.text(), end="\n\n")
            wrong += found.wrong
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
