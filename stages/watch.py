"""The report page on 127.0.0.1, following running stages; `make watch` (NAME=a,b PORT=n). Ctrl-C ends it."""

import argparse
import sys
from pathlib import Path

from midasheng.config import UserError
from midasheng.train.watch import open_server


def main() -> int:
    """Serve runs/<scale>/* until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--name", default="", help="runs, with commas between them; with a slash: a folder")
    parser.add_argument("--port", type=int, default=None, help="0: any free one; not given: the next free from 8060 on")
    args = parser.parse_args()
    names = [name for name in args.name.split(",") if name]
    try:
        server = open_server(Path(args.runs) / args.scale, names, args.port)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{server.address} follows {Path(args.runs) / args.scale}; Ctrl-C ends it", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
