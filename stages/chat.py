"""Ask a trained model about audio files; `make chat AUDIO=x.wav PROMPT="..." NAME=stage3_sft`.

The answer streams to the terminal. Without a prompt each line that is typed is a question about the same audio, on its
own; an empty line or Ctrl-D ends. NAME may be a folder (with a /) of weights in the published layout. Settings: see
ASKED below, as SET="temperature=0.7 max_new_tokens=64".
"""

import argparse
import sys
from pathlib import Path

import midasheng
from midasheng.config import UserError, settings_of
from midasheng.inference import waveform

ASKED: dict[str, type] = {
    "system": str, "text_first": bool, "max_new_tokens": int, "temperature": float, "top_p": float, "top_k": int,
    "seed": int,
}  # fmt: skip
LOADED: dict[str, type] = {"device": str, "dtype": str}


def folder_of(runs: Path, scale: str, name: str) -> Path:
    """The run folder, or the folder that is named. Raises UserError."""
    folder = Path(name) if "/" in name else runs / scale / name
    if not folder.is_dir():
        there = ", ".join(sorted(p.parent.name for p in (runs / scale).glob("*/weights"))) or "none"
        raise UserError(f"there is no run {folder} (finished runs of {scale}: {there}); train it, or say NAME=...")
    return folder


def main() -> int:
    """Load, then answer one prompt or many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--name", default="stage3_sft")
    parser.add_argument("--audio", nargs="*", default=[])
    parser.add_argument("--prompt", default="")
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    try:
        set_ = settings_of(args.settings, {**ASKED, **LOADED})
        folder = folder_of(Path(args.runs), args.scale, args.name)
        audio = [waveform(path) for path in args.audio]  # before the weights: they take longer
        loading = {name: set_.pop(name, "auto") for name in LOADED}
        listener = midasheng.load(folder, loading["device"], loading["dtype"])
        if not args.prompt and sys.stdin.isatty():
            print(f"{folder}: ask about {', '.join(args.audio) or 'anything'}; an empty line ends")
        asked = args.prompt or question()
        while asked:
            for piece in listener.stream(audio, asked, **set_):
                print(piece, end="", flush=True)
            print()
            asked = "" if args.prompt else question()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def question() -> str:
    """The next line that is typed; empty at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
