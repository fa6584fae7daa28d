"""A language model as judge, over any OpenAI-compatible endpoint: each answer beside its reference, in both orders.

Judges favour a position, so each pair is asked twice, and both scores count. What was judged is kept in judged.jsonl:
scoring again asks nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from midasheng.config import UserError
from midasheng.evaluate.rows import Row
from midasheng.evaluate.score import Scored, ratio

VERSION = 1  # of the words below
SYSTEM = "You compare two answers to a question about an audio recording that you cannot hear. Be strict and impartial."
ASK = """Question: {question}

Known about the recording: {reference}

[Answer 1]
{first}
[End of answer 1]

[Answer 2]
{second}
[End of answer 2]

Rate each answer from 1 (useless or wrong) to 10 (right, complete and helpful). Length and order must not matter. \
Reply with the two numbers alone, those of answer 1 and answer 2, separated by a space."""
MOST = 10
TIMEOUT_S = 120.0


class Judge:
    """`url` up to and including /v1; `model` as the endpoint calls it. The key is read from OPENAI_API_KEY, if set."""

    def __init__(self, url: str, model: str, kept: Path) -> None:
        if not model:
            raise UserError("judge: say which model judges, judge_model=NAME: a score without its judge means nothing")
        self.url, self.model, self.path = url.rstrip("/"), model, kept
        lines = kept.read_bytes().splitlines() if kept.is_file() else []
        self.kept: dict[str, str] = {k["asked"]: k["reply"] for k in map(json.loads, lines)}

    def reply(self, question: str, reference: str, first: str, second: str) -> str:
        """What it says, at temperature 0. Raises UserError when the endpoint does not answer."""
        values = {"question": question, "reference": reference, "first": first, "second": second}
        text = re.sub(r"\{(\w+)\}", lambda found: values[found[1]], ASK)
        body = {
            "model": self.model, "temperature": 0, "max_tokens": 16,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
        }  # fmt: skip
        asked = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if asked not in self.kept:
            self.kept[asked] = self._post(body)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"asked": asked, "reply": self.kept[asked]}, ensure_ascii=False) + "\n")
        return self.kept[asked]

    def _post(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                told = json.load(answer)
            return str(told["choices"][0]["message"]["content"])
        except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"judge {self.model} at {self.url} does not answer: {error}") from None

    def __call__(self, rows: Sequence[Row]) -> Scored:
        """`judged`: the answer's score as a share of 10, mean of both orders. `beside_reference`: as a share of the
        reference's score. `first_wins`: how often the first of two is rated higher: .5 where order does not matter.

        An empty answer gets 0 unasked. A pair whose replies cannot be read is the judge's failure: counted, left out.
        """
        found = np.zeros((len(rows), 5))  # own score, reference's score, judged, first wins, asked
        unjudged = 0
        for n, row in enumerate(rows):
            reference = row.references[0]
            if not row.text.strip():
                found[n] = 0, MOST, 1, 0, 0
                continue
            one = scores_of(self.reply(row.prompt, reference, reference, row.text))
            other = scores_of(self.reply(row.prompt, reference, row.text, reference))
            if one is None or other is None:
                unjudged += 1
                continue
            wins = sum(1.0 if first > second else 0.5 if first == second else 0.0 for first, second in (one, other))
            found[n] = (one[1] + other[0]) / 2, (one[0] + other[1]) / 2, 1, wins, 2
        return Scored(
            f"judge/{VERSION} ({self.model})", "none",
            {
                "judged": ratio(found[:, 0], MOST * found[:, 2]), "beside_reference": ratio(found[:, 0], found[:, 1]),
                "first_wins": ratio(found[:, 3], found[:, 4]),
            },
            "", {"unjudged": unjudged},
        )  # fmt: skip


def scores_of(reply: str) -> tuple[float, float] | None:
    """The two numbers of a reply that is two numbers, each from 1 to 10; else None."""
    number = r"(\d+(?:\.\d+)?)(?:\s*/\s*10)?"
    found = re.fullmatch(rf"\s*{number}[\s,;]+{number}[\s.]*", reply)
    if found is None:
        return None
    first, second = float(found[1]), float(found[2])
    return (first, second) if 1 <= first <= MOST and 1 <= second <= MOST else None
