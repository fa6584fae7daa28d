"""The runs of a scale as one page that needs no network; `make report` (NAME=a,b TO=page.html)."""

import argparse
import sys
from pathlib import Path

from midasheng.config import UserError
from midasheng.train.report import Report


def main() -> int:
    """Read runs/<scale>/*, write runs/<scale>/report.html."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--name", default="", help="runs, with commas between them; with a slash: a folder")
    parser.add_argument("--to", default="")
    args = parser.parse_args()
    folder = Path(args.runs) / args.scale
    to = Path(args.to) if args.to else folder / "report.html"
    report = Report(folder, [name for name in args.name.split(",") if name])
    try:
        report.follow()
        if not report.runs:
            raise UserError(f"no run below {folder} has a metrics.jsonl yet; run `make stage1`")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(report.page(), encoding="utf-8")
    print(f"{to}: {len(report.runs)} runs, {to.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
