"""Runs as one page that needs no network: their data as JSON, the plotting library and our code in one HTML file."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from midasheng.config import UserError
from midasheng.train.run_folder import Run

ROOM = Path(__file__).parent


class Report:
    """The runs below a folder (runs/<scale>), or the named ones of them; a name with a slash is a folder itself."""

    def __init__(self, folder: Path, names: Sequence[str] = ()) -> None:
        self.folder, self.names = folder, tuple(names)
        self.runs: dict[Path, Run] = {}

    def follow(self) -> bool:
        """Read what is new. Raises UserError for a name that is no run."""
        folders = sorted(p.parent for p in self.folder.glob("*/metrics.jsonl"))
        if self.names:
            folders = [Path(name) if "/" in name else self.folder / name for name in self.names]
            for folder in folders:
                if not folder.is_dir():
                    there = ", ".join(p.parent.name for p in sorted(self.folder.glob("*/metrics.jsonl"))) or "none"
                    raise UserError(f"no run {folder} (runs there: {there}); say NAME=a,b")
        changed = list(self.runs) != folders
        self.runs = {folder: self.runs.get(folder) or Run(folder) for folder in folders}
        new = [run.follow() for run in self.runs.values()]  # every one of them
        return changed or any(new)

    def data(self) -> dict[str, Any]:
        """Everything but the clips."""
        runs = sorted((run.data() for run in self.runs.values()), key=lambda r: (r["stage"], r["name"]))
        return {"folder": str(self.folder), "made": datetime.now(UTC).isoformat(timespec="seconds"), "runs": runs}

    def clips(self) -> dict[str, str]:
        """Audio of the answers that are shown."""
        return {name: uri for run in self.runs.values() for name, uri in run.clips().items()}

    def page(self, *, live: bool = False) -> str:
        """The page. `live`: it asks where it came from for what is new."""
        return page(self.data(), self.clips(), live=live)


def as_json(content: Any) -> str:
    """JSON that may stand inside a page: no `<` in it, so nothing in it can end a script."""
    return orjson.dumps(content).decode().replace("<", "\\u003c")


def page(data: dict[str, Any], clips: dict[str, str], *, live: bool) -> str:
    """One self-contained HTML file. Only our own two scripts may run in it, whatever stands in the data."""
    plot = (ROOM / "uplot" / "uPlot.iife.min.js").read_text(encoding="utf-8")
    code = (ROOM / "report.js").read_text(encoding="utf-8")
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in (plot, code)]
    scripts, asks = " ".join(f"'sha256-{h}'" for h in hashes), "'self'" if live else "'none'"
    policy = f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; media-src data:; img-src data:; "
    policy += f"connect-src {asks}"
    parts = {
        "POLICY": policy, "LIVE": "yes" if live else "no",
        "UPLOT_CSS": (ROOM / "uplot" / "uPlot.min.css").read_text(encoding="utf-8"), "UPLOT": plot, "CODE": code,
        "DATA": as_json(data), "CLIPS": as_json(clips),
    }  # fmt: skip
    template = (ROOM / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([A-Z_]+)\}\}", lambda found: parts[found[1]], template)
