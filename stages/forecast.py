"""What the three stages will cost at a scale, without weights, GPU or data; `make forecast SCALE=7b`.

CONFIG=... forecasts one stage file alone; SET="forecast.KEY=VALUE ..." changes what is assumed.
"""

import sys

from midasheng.config import UserError
from midasheng.train.forecast import page
from midasheng.train.order import command_line

STAGES = ("stage1_align", "stage2_pretrain", "stage3_sft")


def main() -> int:
    """One stage (--config), or all three."""
    one = any(a.startswith("--config") for a in sys.argv)
    try:
        orders = [command_line("")] if one else [command_line(f"configs/{name}.yaml") for name in STAGES]
        print("m measured, d derived by the code that will run, a assumed (forecast.*: `make keys`)")
        for order in orders:
            print("\n" + page(order.stage, order.scale))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
