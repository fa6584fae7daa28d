"""Draw the loss of every run of a scale into curves.png, .svg and .csv and print a table; `make curves`."""

import argparse
import sys
from pathlib import Path

from midasheng.config import UserError
from midasheng.train.curves import draw, read_curves, table, write_csv


def main() -> int:
    """Read runs/<scale>/*/metrics.jsonl, write runs/<scale>/curves.png, .svg and .csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--runs", default="runs")
    args = parser.parse_args()
    folder = Path(args.runs) / args.scale
    try:
        curves = read_curves(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(curves, folder / "curves.png", folder / "curves.svg")
    write_csv(curves, folder / "curves.csv")
    print(f"{table(curves)}\n{folder / 'curves.png'}, and beside it curves.svg and curves.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
