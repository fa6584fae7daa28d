"""One pass over every shard of a scale's stages, and what was found there; `make index`.

Writes a side file for each shard into data.index (what is done is not done again), and prints for each corpus what it
holds and what was left out. Exit status 1 when a shard is damaged.
"""

import sys

from midasheng.config import UserError
from midasheng.data.index import CorpusIndex
from midasheng.data.room import mixes, open_chat, open_corpora
from midasheng.train.order import command_line

STAGES = ("stage1_align", "stage2_pretrain", "stage3_sft")


def line(corpus: CorpusIndex) -> str:
    """A corpus in one line."""
    found = corpus.summary
    left_out = ", ".join(f"{n} {reason}" for reason, n in sorted(found.reasons.items())) or "none"
    held_out = sum(r.held_out for r in corpus.rows)
    return (
        f"{corpus.card.name:24}{len(corpus.rows):7} shards{len(corpus):10} records{found.hours:10.2f} h"
        f"{held_out:7} held out; left out: {left_out}"
    )


def main() -> int:
    """Index the mixes of one stage (--config), or of all stages that have one at this scale."""
    one = any(a.startswith("--config") for a in sys.argv)
    lines: dict[str, str] = {}
    damage: dict[str, None] = {}
    try:
        for stage in (
            [command_line("").stage] if one else [command_line(f"configs/{name}.yaml").stage for name in STAGES]
        ):
            mix, also = mixes(stage)
            for cards in (mix.cards, *(other.cards for other in also.values())):
                for corpus in open_corpora(stage, open_chat(stage), cards, make=True):
                    lines[f"{corpus.card.name} {stage.data.clips}"] = line(corpus)
                    damage |= dict.fromkeys(corpus.summary.damage)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines.values()))
    for text in damage:
        print(f"DAMAGED {text}")
    return 1 if damage else 0


if __name__ == "__main__":
    sys.exit(main())
