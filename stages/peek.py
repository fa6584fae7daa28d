"""One pack as the model sees it; `make peek` (CONFIG= or NAME=run, STEP=n, PACK=k, KEY=corpus/key, TO=page.html).

Made by the planner and the loader that train. With NAME the losses of that run's weights stand beside the targets.
Exit status 1 when a check of the loss mask fails.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from midasheng import config
from midasheng.config import UserError
from midasheng.data.peek import check, choose, find, planner_before
from midasheng.data.room import read_data
from midasheng.train import memory, peek


def main() -> int:
    """Show one pack."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--config", default="")
    parser.add_argument("--name", default="")
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--pack", type=int, default=0)
    parser.add_argument("--key", default="")
    parser.add_argument("--to", default="")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    a = parser.parse_intermixed_args()
    try:
        look = take(a)
        if a.to:
            try:
                Path(a.to).write_text(peek.page(look), encoding="utf-8")
            except OSError as error:
                raise UserError(f"TO={a.to} cannot be written: {error.strerror}") from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(peek.text(look, colour=colour, width=shutil.get_terminal_size().columns))
    if a.to:
        print(f"also in {a.to}, with the clips to listen to")
    return 1 if look.wrong else 0


def take(a: argparse.Namespace) -> peek.Look:
    """The pack that was asked for. Raises UserError."""
    folder = Path(a.runs) / a.scale / a.name if a.name else None
    if folder:
        if a.config or a.settings:
            raise UserError(
                "NAME= looks at a run with its own settings; CONFIG= and SET= are for one that is yet to be"
            )
        stage = config.of_run(folder / "config.yaml")
    else:
        stage = config.load(Path(a.config or "configs/stage1_align.yaml"), a.scale, a.settings).stage
    data = read_data(stage, make=True)
    planner = planner_before(data, stage.run.seed, a.step, folder)
    step, number = find(data, planner, a.key) if a.key else (a.step, a.pack)
    chosen = choose(data, planner_before(data, stage.run.seed, step, folder), number)
    found = peek.model_of_run(stage, folder, data.chat) if folder else None
    nats, where = (peek.losses(found[0], chosen.pack, memory.device_of(stage)), found[1]) if found else (None, "")
    notes = [f"KEY={a.key} is trained on here next"] if a.key else []
    if folder and not found:
        notes.append(f"{folder} has no checkpoint yet, so no losses")
    if stage.batch.pack_slots == "auto":
        notes.append(f"batch.pack_slots=auto: a run finds out how many; here {data.budget.pack_slots}")
    title = (
        f"{a.name or stage.name} at {a.scale}, mix {data.mix.name}: step {step} of {data.course.steps}, "
        f"pack {number} of {data.budget.packs_per_step}"
    )
    shown = peek.segments(chosen.pack, data.chat, nats)
    return peek.Look(
        title, tuple(notes), chosen, data.budget, tuple(shown), tuple(check(chosen, data.chat)), where
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
