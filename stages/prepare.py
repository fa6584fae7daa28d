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

import yaml

from midasheng.curate.asterisk import FINISHED, finished, prepare
from midasheng.curate.tokenizer import DEFAULT_TOKENS

CARDS = Path(__file__).resolve().parent.parent / "data_manifests" / "corpora"


def card_prompts(folder: Path) -> list[str]:
    """The prompts of all asterisk cards, in a fixed order. ValueError when there are no cards."""
    paths = sorted(folder.glob("asterisk_*.yaml"))
    if not paths:
        raise ValueError(f"no asterisk_*.yaml in {folder}: the corpus cards belong to the repository")
    cards = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]
    return [prompt for card in cards for prompt in card.get("prompts", [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make, e.g. data/mini")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="most tokens of the tokenizer")
    args = parser.parse_args()
    start_s = time.monotonic()
    was_finished = finished(args.out, args.tokens) is not None
    try:
        summary = prepare(args.out, args.out.parent / "downloads", card_prompts(CARDS), args.tokens)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"prepare: {error}")
    print(summary.table())
    if was_finished:
        print(f"{args.out} was complete already (delete {args.out / FINISHED} to make it anew)")
    else:
        print(f"made {args.out} in {time.monotonic() - start_s:.0f} s; licences in {args.out / 'LICENCES'}")


if __name__ == "__main__":
    main()
