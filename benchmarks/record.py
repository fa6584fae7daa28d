"""What the benchmarks measured, in files of benchmarks/results: a section for each benchmark, or for each model."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def record(section: str, values: dict[str, Any], file: str = "bench.json") -> None:
    """Replace one section; the others stay as they are."""
    path = RESULTS / file
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(known | {section: values}, indent=1, sort_keys=True) + "\n")
