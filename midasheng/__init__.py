"""The library behind the three training stages; importing it brings in neither lightning nor webdataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from midasheng.inference import Listener

__version__ = "0.1.0"


def load(path: str | Path, device: str = "auto", dtype: str = "auto") -> Listener:
    """A trained model that answers questions about audio; see midasheng/inference.py.

    `path`: a run folder, its weights/, a folder in the published layout, or a hub id. `device`: auto (a GPU where there
    is one), cpu, cuda, cuda:1, ...; `dtype`: auto (bfloat16 on a GPU, else float32), float32 or bfloat16. Raises
    UserError.
    """
    from midasheng import inference

    return inference.load(path, device, dtype)
