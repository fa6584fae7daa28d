"""Run an exported folder in a process that has never heard of its maker: audio files -> AutoProcessor -> logits.

    python reload.py JOB.json OUT.safetensors

JOB: folder, adapter ("" for none), batch, threads, trials [{messages}]; parts of a message are {type: audio, path} and
{type: text, text}.
OUT: of trial i ids_i (T,), logits_i (text slots, V) and of its clips mel_i_j (64, M).
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer


@torch.no_grad()
def main(job: Path, out: Path) -> None:
    """Read the job, write what the model makes of it."""
    asked = json.loads(job.read_text(encoding="utf-8"))
    folder, trials = asked["folder"], asked["trials"]
    torch.set_num_threads(asked["threads"])  # the order of additions may depend on it
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    wrong = {name: sorted(map(str, found)) for name, found in loading.items() if found}
    assert not wrong, f"not loaded as stored: {wrong}"
    if asked["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, asked["adapter"])
    model = model.eval()
    own = model.get_base_model() if asked["adapter"] else model
    made: dict[str, torch.Tensor] = {}
    rows = -(-len(trials) // asked["batch"])
    for first in range(rows):
        numbers = range(first, len(trials), rows)  # short and long ones together, so that padding is part of the proof
        texts = [processor.apply_chat_template(trials[i]["messages"], tokenize=False) for i in numbers]
        parts = [
            [p["path"] for m in trials[i]["messages"] for p in m["content"] if p["type"] == "audio"] for i in numbers
        ]
        inputs = processor(text=texts, audio=[path for paths in parts for path in paths])
        logits = model(**inputs).logits.float()
        clips = iter(zip(inputs["input_values"], inputs["audio_length"].tolist(), strict=True))
        for row, i in enumerate(numbers):
            real = inputs["attention_mask"][row].bool()
            ids = inputs["input_ids"][row]
            made[f"ids_{i}"] = ids[real]
            made[f"logits_{i}"] = logits[row, real & (ids != own.config.audio_token_id)]
            for j in range(len(parts[row])):
                values, n = next(clips)
                made[f"mel_{i}_{j}"] = own.audio_encoder.log_mel(values[:n])
    save_file({name: t.contiguous() for name, t in made.items()}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
