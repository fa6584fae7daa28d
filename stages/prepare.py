"""From what people have to shards that train: a table of paths and text, a dataset, cuts, tars; `make prepare`.

    python -m stages.prepare --data my.csv --name mine [--out data/mine] [--task caption | --prompt "..."]
        [--columns "audio=path answer=caption"] [codec=opus] [shard_mb=256] [test_share=0] [held_out_share=0.02]
        [licence=CC-BY-4.0] [languages=en,de] [root=/where/the/paths/begin] [workers=8]

Writes shards, a card, a mix of that corpus alone and a report in which every row of the input is accounted for. Stopped
or killed, the same command goes on.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import yaml

from midasheng.config import UserError
from midasheng.curate.encode import CODECS
from midasheng.curate.prepare import Report, Settings, fingerprint, prepare
from midasheng.curate.sources import open_source

PROMPTS = Path(__file__).resolve().parent.parent / "data_manifests" / "prompts.yaml"
NUMBERS = {"shard_mb": 256.0, "test_share": 0.0, "held_out_share": 0.02, "workers": float(os.cpu_count() or 1)}
WORDS = {"codec": "flac", "licence": "unknown", "languages": "", "root": ""}


def pairs(text: str, known: set[str] | None, what: str) -> dict[str, str]:
    """ "a=b c=d" -> {"a": "b", "c": "d"}. Raises UserError."""
    found = dict(one.partition("=")[::2] for one in text.split())
    for name, value in found.items():
        if not value or (known is not None and name not in known):
            raise UserError(f"{what}: `{name}={value}`; write NAME=VALUE with {', '.join(sorted(known or ['a role']))}")
    return found


def corpus_name(data: str) -> str:
    """Name of a corpus where none is said: the input's own, in letters that paths take."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(data.rstrip("/")).name.split(".")[0])


def ordered(data: str, name: str, out: str, task: str, prompt: str, columns: str, settings: str) -> tuple[Path, Report]:
    """Prepare what the command line asks for: (its folder, the report). Raises UserError."""
    given = pairs(settings, set(NUMBERS) | set(WORDS), "SET")
    try:
        numbers = NUMBERS | {k: float(given[k]) for k in NUMBERS if k in given}
    except ValueError as error:
        raise UserError(f"SET: {error}; {', '.join(NUMBERS)} are numbers") from None
    words = WORDS | {k: given[k] for k in WORDS if k in given}
    published = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
    if task and task not in published:
        raise UserError(f"TASK={task}: there are {', '.join(published)}; for another one say PROMPT=")
    if words["codec"] not in CODECS:
        raise UserError(f"SET: codec={words['codec']}; there are {', '.join(CODECS)}")
    if not (0 <= numbers["test_share"] < 1 and 0 <= numbers["held_out_share"] < 0.5 and numbers["shard_mb"] > 0):
        raise UserError("SET: test_share lies in 0 to 1, held_out_share in 0 to 0.5, shard_mb above 0")
    name = name or corpus_name(data)
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)?", name):  # yodas.en is a part of a corpus
        raise UserError(f"NAME={name}: letters, digits, _ and - make a corpus' name, and a dot before a part of it")
    chosen = Settings(
        name=name, task=task or "unknown", prompts=(prompt,) if prompt else tuple(published[task]) if task else (),
        codec=words["codec"], shard_bytes=round(1e6 * numbers["shard_mb"]), test_share=numbers["test_share"],
        held_out_share=numbers["held_out_share"], licence=words["licence"],
        languages=tuple(filter(None, words["languages"].split(","))),
    )  # fmt: skip
    roles = pairs(columns, None, "COLUMNS")
    items = open_source(data, roles, chosen.prompts, words["root"])
    folder = Path(out or f"data/{name}")
    mark = fingerprint(data, chosen, (sorted(roles.items()), words["root"]))
    return folder, prepare(items, folder, chosen, mark, max(1, int(numbers["workers"])))


def main() -> int:
    """Prepare, print the report and what to do next."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for option in ("--data", "--name", "--out", "--task", "--prompt", "--columns"):
        parser.add_argument(option, default="", required=option == "--data")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    a = parser.parse_intermixed_args()
    try:
        out, report = ordered(a.data, a.name, a.out, a.task, a.prompt, a.columns, " ".join(a.settings))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(report.text())
    print(f"shards, card and mix are in {out}; rows that were dropped, in {out / 'dropped.jsonl'}")
    name = a.name or corpus_name(a.data)
    print(f"train on it: make finetune DATA={out}; or put the card into a mix of yours, or in any stage say")
    print(f'  SET="data.root={out}/shards data.manifests={out}/manifests data.mix={name} data.also=[]"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
