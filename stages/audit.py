"""What a run was really trained on; `make audit NAME=stage2_pretrain` (STEP=n, KEY=corpus/key).

Reads the run's ledger beside its plan: repeats, gaps, asked against realised shares, epochs, held-out records. Writes
audit.json into the run folder; exit status 1 when something is wrong.
"""

import argparse
import sys
from pathlib import Path

from midasheng import config
from midasheng.config import UserError
from midasheng.data.audit import RunLedger
from midasheng.data.room import mixes, open_chat, open_corpora, read_data


def main() -> int:
    """Audit one run folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--name", required=True)
    parser.add_argument("--step", type=int)
    parser.add_argument("--key")
    args = parser.parse_args()
    folder = Path(args.runs) / args.scale / args.name
    try:
        stage = config.of_run(folder / "config.yaml")
        data = read_data(stage, make=False)
        ledger = RunLedger(folder, data.planner(stage.run.seed), data.corpora)
        if args.step is not None or args.key:
            print("\n".join(ledger.of_key(args.key) if args.key else ledger.of_step(args.step)))
            return 0
        others = [card for other in mixes(stage)[1].values() for card in other.cards]
        found = ledger.audit(open_corpora(stage, open_chat(stage), others, make=False))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found.write(folder / "audit.json")
    print(found.text())
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
