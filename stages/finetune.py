"""From data of one's own to a tuned model, by stage 3's contract; `make finetune DATA=my.csv`.

Prepares DATA into data/NAME-OF-DATA as `make prepare` does (a folder that it has made is taken as it is), and trains on
that corpus alone, from the weights of stage 2 or of FROM: a run of stage 2, of stage 3, or an earlier fine-tuning.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from midasheng.config import UserError
from midasheng.train.fit import run_stage
from midasheng.train.order import command_line
from stages.prepare import corpus_name, ordered
from stages.stage3_sft import contract

CONFIG = "configs/finetune.yaml"


def start_of(rest: list[str]) -> list[str]:
    """The setting that starts from FROM, where that is no run of the stage that the config names. Raises UserError."""
    order = command_line(CONFIG, rest)
    record = order.runs / order.scale / order.start_from / "weights" / "stage.json"
    stage = json.loads(record.read_text(encoding="utf-8")).get("stage") if record.is_file() else ""
    return [f"start=[{{from: {stage}, take: ['*']}}]"] if stage in ("stage3_sft", "finetune") else []


def main() -> int:
    """Prepare, then train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for option in ("--data", "--task", "--prompt", "--columns"):
        parser.add_argument(option, default="", required=option == "--data")
    a, rest = parser.parse_known_args()

    def prepare() -> list[str]:
        """The settings that name the corpus, which lies there then. Raises UserError."""
        folder = Path(a.data)
        if not (folder / "journal.jsonl").is_file():
            folder = Path("data") / corpus_name(a.data)
            _, report = ordered(a.data, "", str(folder), a.task, a.prompt, a.columns, "")
            print(report.text())
        mixes = [path.stem for path in (folder / "manifests").glob("*.yaml")]
        if len(mixes) != 1:
            raise UserError(f"{folder}: preparing was not finished; make prepare DATA=... OUT={folder}")
        ours = [f"data.root={folder}/shards", f"data.manifests={folder}/manifests", f"data.mix={mixes[0]}"]
        return [*ours, *start_of(rest)]

    return run_stage(CONFIG, partial(contract, name="finetune"), rest, prepare)


if __name__ == "__main__":
    sys.exit(main())
