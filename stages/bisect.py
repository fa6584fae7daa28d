"""Why a step of a run was not finite; `make bisect NAME=stage2_pretrain` (STEP=n).

Makes the steps that were skipped last again, from the nearest checkpoint, halves their packs down to the sample, and
says whether it is the data, the numerics or the weights. Samples that fail alone go to the run's quarantine.txt, and
the run goes on without them. Exit status 1 when nothing was found.
"""

import argparse
import sys
from pathlib import Path

from midasheng import config
from midasheng.config import UserError
from midasheng.data.peek import planner_before
from midasheng.data.quarantine import FILE, quarantine, quarantined, records
from midasheng.data.room import read_data
from midasheng.train import bisect, memory


def main() -> int:
    """Bisect the last skipped steps, or the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--name", required=True)
    parser.add_argument("--step", type=int)
    a = parser.parse_args()
    folder = Path(a.runs) / a.scale / a.name
    try:
        return find(folder, a.step)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def find(folder: Path, asked: int | None) -> int:
    """Bisect, say, quarantine. Raises UserError."""
    stage = config.of_run(folder / "config.yaml")
    events = bisect.skipped_steps(folder)
    steps = bisect.last_row(events, folder) if asked is None else [asked]
    data = read_data(stage, make=False)
    model, where = bisect.model_before(stage, folder, data, steps[0], [e["number"] for e in events])
    print(f"weights: {where}")
    without = records(quarantined(folder), data.corpora)
    replay = bisect.Replay(model, stage, data, without, memory.device_of(stage))
    found = []
    for step in steps:
        found.append(replay.bisect(next(planner_before(data, stage.run.seed, step, folder)), said=print))
        print("\n".join(found[-1].lines()), flush=True)
        if found[-1].weights:
            break
    new = [n for f in found for c in f.culprits for n in quarantine(folder, [c.name], f"step {f.step}, {c.verdict}")]
    if new:
        print(
            f"{', '.join(new)}: now in {folder / FILE}; the same command goes on without. Whoever wants a sample back "
            "takes its line out; a card's `exclude` keeps it from other runs too"
        )
    elif not any(f.reproduced for f in found) and steps[0]:
        print(
            "where the weights above are not exactly those that met the step: train up to it with SET="
            f'"log.checkpoint_every={steps[0]} optim.max_skips=1" and bisect again'
        )
    return 0 if any(f.reproduced for f in found) else 1


if __name__ == "__main__":
    sys.exit(main())
