"""An answer in words, and its row in answers.jsonl: the same of a stage's validation and of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a model says: its text, why it ended ("stop": by itself; "length": at the most new tokens that it may take),
    the number of its tokens, and seconds from the start of its batch to its end."""

    text: str
    finish: str
    new_tokens: int
    seconds: float

    def __str__(self) -> str:
        return self.text

    def row(
        self, *, id: str, task: str, prompt: str, choices: Sequence[str], references: Sequence[str]
    ) -> dict[str, Any]:
        """The answer beside what was asked. `choices`: the answers to choose from, none where the question is open;
        `references`: every answer that is right. All but `seconds` are the same wherever the same model is asked."""
        return {
            "id": id, "task": task, "prompt": prompt, "choices": list(choices), "references": list(references),
            "output": self.text, "new_tokens": self.new_tokens, "finish_reason": self.finish,
            "seconds": round(self.seconds, 3),
        }  # fmt: skip
