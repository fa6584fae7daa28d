"""What the encoder of a run tells of clips, beside the one it started from; `make probe NAME=stage1_align`.

Trains a linear head and asks nearest neighbours on mean frames, in X-ARES's manner, and writes probe.json into the
run's folder. Several runs (NAME=a,b) are probed on the same clips, into one table.
"""

import argparse
import logging
import sys
from pathlib import Path

from midasheng import config
from midasheng.config import UserError

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it warns of kernels that nobody asked

from midasheng.evaluate import probe  # noqa: E402


def main() -> int:
    """Probe the encoders of runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for option, default in (("scale", "mini"), ("runs", "runs"), ("tasks", "")):
        parser.add_argument(f"--{option}", default=default)
    parser.add_argument("--name", required=True)
    a = parser.parse_args()
    runs = [Path(a.runs) / a.scale / name for name in a.name.split(",")]
    try:
        data = config.of_run(runs[0] / "config.yaml").data
        path = Path(a.tasks or data.probe or "data_manifests/probe/mini.yaml")
        tasks, root = probe.read_tasks(path, Path(data.root))
        print(probe.of_runs(runs, tasks, root))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
