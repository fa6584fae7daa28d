"""A run -> a folder that transformers and vLLM load, or its adapter, proved equal; `make export TO=dir NAME=...`.

Nothing lies under TO unless its certificate has passed: logits, from audio files in a fresh process, of the live model.
"""

import argparse
import sys
from pathlib import Path

import transformers

from midasheng import config
from midasheng.config import UserError
from midasheng.data.chat import Chat
from midasheng.data.manifest import read_card
from midasheng.data.trials import conversations
from midasheng.model.certificate import Trial
from midasheng.model.export import Asked, check, export
from midasheng.train.fit import git_commit


def licence(manifests: Path, corpus: str) -> str:
    """What the corpus's card says, or `unknown`."""
    folder, (name, _, part) = manifests.parent / "corpora", corpus.partition(".")
    try:
        whole = folder / f"{corpus}.yaml"
        return (read_card(whole) if whole.is_file() else read_card(folder / f"{name}.yaml", part)).licence
    except (UserError, OSError):
        return "unknown"


def main() -> int:
    """Export one run folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for option, default in (("scale", "mini"), ("runs", "runs"), ("format", "hf"), ("dtype", "fp32"), ("target", "")):
        parser.add_argument(f"--{option}", default=default)
    parser.add_argument("--name", required=True)
    parser.add_argument("--to", required=True, type=Path)
    parser.add_argument("--fresh", action="store_true")
    a = parser.parse_args()
    transformers.logging.set_verbosity_error()  # it warns that it does not know the model whose tokenizer is read
    run = Path(a.runs) / a.scale / a.name
    try:
        stage = config.of_run(run / "config.yaml")
        if not (run / "weights" / "stage.json").is_file():
            raise UserError(f"the run {run} is not finished (it has no weights/ yet); finish it first")
        asked = Asked(a.to, a.format, a.dtype, a.target, a.fresh)
        check(asked, stage)
        t = stage.tokenizer
        chat = Chat(str(run / "weights"), t.audio_bos, t.audio, t.audio_eos, t.turn_start, t.turn_end)
        made, heard = conversations(stage, chat)
        trials = [Trial(turns, clips, sample) for turns, clips, sample in made]
        print(f"{run} -> {a.to} ({a.format}, {a.dtype}); proved on {len(trials)} conversations: {heard}")
        manifests = Path(stage.data.manifests)
        found = export(run, stage, asked, trials, heard, lambda corpus: licence(manifests, corpus), git_commit())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in (found["certificate"] | {"serves": found["serves"]}).items():
        print(f"  {name}: {value}")
    print(f"{a.to}: README.md says how to use it, EXPORT.json what was proved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
