"""Serve a trained model as OpenAI's API does, on one machine; `make serve NAME=stage3_sft`.

On 127.0.0.1 and port 8000 unless SET="host=0.0.0.0 port=9000" says otherwise; there is no key and no encryption. NAME
may be a folder (with a /) of weights in the published layout.
"""

import argparse
import sys
from pathlib import Path

import midasheng
from midasheng.config import UserError, settings_of
from stages.chat import LOADED, folder_of

SETTINGS: dict[str, type] = {"host": str, "port": int, "batch": int, **LOADED}


def main() -> int:
    """Load, then answer until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--name", default="stage3_sft")
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    try:
        set_ = settings_of(args.settings, SETTINGS)
        try:
            import uvicorn

            from midasheng.serve import BATCH, app
        except ImportError as error:
            raise UserError(f"make serve needs {error.name}: pip install 'midasheng-train[serve]'") from None
        folder = folder_of(Path(args.runs), args.scale, args.name)
        listener = midasheng.load(folder, set_.get("device", "auto"), set_.get("dtype", "auto"))
        server = app(listener, args.name, set_.get("batch", BATCH))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    uvicorn.run(server, host=set_.get("host", "127.0.0.1"), port=set_.get("port", 8000))
    return 0


if __name__ == "__main__":
    sys.exit(main())
