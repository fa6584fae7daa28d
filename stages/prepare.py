"""Prepare the mini data: real speech in five languages, a tokenizer and licences, from Debian packages.

    python -m stages.prepare --out data/mini        (make data)

Needs apt-get and dpkg (no root) and downloads 53 MB, kept in data/downloads. Reads the prompts of the corpus
cards in data_manifests/corpora for the tokenizer. Does nothing when the data are complete; to make them anew,
delete prepared.json. The tokenizer belongs to the trained weights: changing a card does not retrain it.
"""

import argparse
import sys
import time
from pathlib import Path

from midasheng.config import UserError
from midasheng.curate.mini import FINISHED, finished, prepare
from midasheng.curate.tokenizer import DEFAULT_TOKENS
from midasheng.data.manifest import read_card

CARDS = Path(__file__).resolve().parent.parent / "data_manifests" / "corpora"


def card_prompts(folder: Path) -> list[str]:
    """The prompts of all asterisk cards, sorted, each once however many cards use it. Raises UserError."""
    paths = sorted(folder.glob("asterisk_*.yaml"))
    if not paths:
        raise UserError(f"no asterisk_*.yaml in {folder}: the corpus cards belong to the repository")
    return sorted({prompt for path in paths for prompt in read_card(path).prompts})


def main() -> int:
    """Make the mini data unless they are complete; print what there is per language."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make, e.g. data/mini")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="most tokens of the tokenizer")
    args = parser.parse_args()
    start_s = time.monotonic()
    was_finished = finished(args.out, args.tokens) is not None
    try:
        summary = prepare(args.out, args.out.parent / "downloads", card_prompts(CARDS), args.tokens)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary.table())
    if was_finished:
        print(f"{args.out} was complete already (delete {args.out / FINISHED} to make it anew)")
    else:
        print(f"made {args.out} in {time.monotonic() - start_s:.0f} s; licences in {args.out / 'LICENCES'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
