"""What the benchmarks measured, in one file: benchmarks/results/bench.json, a section for each benchmark."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "bench.json"


def record(section: str, values: dict[str, Any]) -> None:
    """Replace one section; the others stay as they are."""
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(known | {section: values}, indent=1, sort_keys=True) + "\n")
