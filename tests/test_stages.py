"""The three stages as a user runs them: what they refuse, and what they write."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from midasheng.data.room import read_data
from midasheng.model.adapt import base_state
from midasheng.model.audio_lm import AudioLM
from midasheng.model.encoder import EncoderShape
from midasheng.model.sources import sha256_file
from midasheng.model.weights import released_config
from midasheng.train import world
from midasheng.train.fit import run_stage as main
from midasheng.train.meter import read_metrics
from stages import finetune, stage1_align, stage2_pretrain, stage3_sft, text_decoder
from tests.conftest import (
    CONFIGS,
    Tiny,
    flac,
    order_for,
    record,
    run_stage,
    tone,
    trained_keys,
    training_records,
    write_shard,
)  # fmt: skip

CONTRACTS = {
    "stage1_align": stage1_align.contract, "stage2_pretrain": stage2_pretrain.contract,
    "stage3_sft": stage3_sft.contract, "text_decoder": text_decoder.contract,
}  # fmt: skip


def run(stage: str, tiny: Tiny, runs: Path, *argv: str, **more: object) -> int:
    """`make stageN` without make: the exit status."""
    default = str(CONFIGS / f"{stage}.yaml")
    return main(default, CONTRACTS[stage], ["--runs", str(runs), *argv, *tiny.settings(**more)])


@pytest.fixture(scope="session")
def stage1(tiny, tmp_path_factory) -> Path:
    """A runs folder with a finished stage 1."""
    runs = tmp_path_factory.mktemp("stage1")
    run_stage("stage1_align", tiny, runs)
    return runs


@pytest.fixture
def runs(stage1, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(stage1, tmp_path / "runs")
    return tmp_path / "runs"


def refused(capsys, status: int, *words: str) -> None:
    """One clear line, no traceback."""
    err = capsys.readouterr().err
    assert status == 2
    assert err.splitlines()[-1].startswith("error: "), err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err


# -- bad input: nothing is written, and the message says what to do --------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"start": "[{from: '', take: ['decoder.*']}]"}, ["start[0].from is empty", "weights.encoder=PATH"]),
        (
            {"data__without": "[tiny_captoin]"},
            ["data.without: `tiny_captoin` names no corpus of align", "tiny_caption"],
        ),
        ({"lora__targts": "[q_proj]"}, ["lora.targts", "did you mean `lora.targets`"]),
        ({"lora__targets": "[query]"}, ["lora.targets: `query`", "q_proj", "down_proj", "all-linear"]),
        ({"train": "[audio_encodr.*]"}, ["add audio_encoder.*"]),
        (
            {"train": "[audio_encoder.*,audio_projectr.*]"},
            ["`audio_projectr.*` matches no tensor", "audio_projector.*"],
        ),
        ({"data__mix": "alignn"}, ["alignn.yaml", "align, pretrain, sft, text"]),
        ({"data__root": "nowhere"}, ["no shard matches nowhere/tiny-*.tar", "make data"]),
        ({"tokenizer__path": "nowhere"}, ["tokenizer.path", "make data"]),
        ({"weights__decoder": "nowhere/text_decoder"}, ["nowhere/text_decoder does not exist", "make data"]),
        ({"fresh": "[audio_encoder.*]"}, ["no origin", "audio_projector."]),
        ({"fresh": "['*']"}, ["two origins", "decoder."]),
        ({"run__precision": "bf16-true"}, ["bf16-true", "does not move"]),
        ({"run__warmup": "50 steps"}, ["50 steps of warm-up in a run of 4", "run.length"]),
        ({"data__max_audio_s": 0.1}, ["no record can be trained on", "too long"]),
        ({"model__encoder__heads": "x"}, ["model.encoder.heads"]),
        ({"optim__lr": -1}, ["optim.lr: -1.0"]),
        ({"lora__dropout": 1.5}, ["lora.dropout: 1.5"]),
        ({"run__length": "0 steps"}, ["trains nothing"]),
        ({"lora__targets": "q_proj"}, ["write a list", "lora.targets=[...]"]),
        ({"data__mix": ""}, ["data.mix", "no manifest", "there are: align"]),
        ({"optim__lr_for": "{nothing: 1e-3}"}, ["`nothing` matches no tensor that learns"]),
        ({"model__decoder__fields__hidden_sizes": 3}, ["hidden_sizes"]),
        ({"hardware__attention": "varlen"}, ["varlen does not run on cpu in torch.float32", "write sdpa"]),
        (
            {
                "hardware__attention": "varlen",
                "hardware__memory_gib": 1,
                "batch__kind": "throughput",
                "batch__pack_slots": "auto",
            },
            ["varlen does not run on cpu"],
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_refused_before_anything_is_written(tiny, tmp_path, capsys, more, words):
    status = run("stage1_align", tiny, tmp_path / "runs", **more)
    refused(capsys, status, *words)
    assert not (tmp_path / "runs").exists()


def test_unknown_scale_lists_the_scales(tiny, tmp_path, capsys):
    status = run("stage1_align", tiny, tmp_path, "--scale", "minni")
    refused(capsys, status, "did you mean mini", "0.6b, 3b, 7b, generated, mini")


def test_what_one_process_can_refuse_starts_no_others(tiny, tmp_path, capsys, monkeypatch):
    """8 processes took 40 s to say, one after the other, that the stage before is missing."""
    monkeypatch.setattr(world, "start_here", lambda processes, tell: 99)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    status = run("stage2_pretrain", tiny, tmp_path, hardware__devices=2)
    refused(capsys, status, "there is no run", "run `make stage1` first")
    assert run("stage1_align", tiny, tmp_path, hardware__devices=2) == 99


def test_a_wrong_target_fails_before_step_0_in_stage_2(tiny, runs, capsys):
    refused(capsys, run("stage2_pretrain", tiny, runs, lora__targets="[query]"), "q_proj")
    assert not (runs / "mini/stage2_pretrain").exists()


def test_mix_far_from_100(tiny, tmp_path, capsys):
    other = tmp_path / "manifests"
    shutil.copytree(tiny.manifests.parent, other)
    (other / "tiny" / "align.yaml").write_text(yaml.safe_dump({"corpora": {"tiny_caption": 90}}))
    refused(capsys, run("stage1_align", tiny, tmp_path / "runs", data__manifests=other / "tiny"), "sum to 90", "100")


def damaged_shards(tiny: Tiny, folder: Path) -> tuple[Path, dict[str, list[str]], set[str]]:
    """A copy of the shards of which one is cut off and another has a header overwritten; the words of each damage, and
    the keys that are lost."""
    shards = folder / "shards"
    shutil.copytree(tiny.shards, shards, ignore=shutil.ignore_patterns(".index"))
    first, second = shards / "tiny-000000.tar", shards / "tiny-000001.tar"
    with tarfile.open(first) as tar:
        hit = tar.getmembers()[4]  # the audio of the third record
    data = bytearray(first.read_bytes())
    data[hit.offset : hit.offset + 512] = b"x" * 512
    first.write_bytes(data)
    with tarfile.open(second) as tar:
        members = tar.getmembers()
    cut = members[20].offset_data + 100
    second.write_bytes(second.read_bytes()[:cut])
    lost = {m.name.split(".")[0] for m in members[20:]} | {hit.name.split(".")[0]}
    next_header = hit.offset_data + -(-hit.size // 512) * 512
    words = {
        first.name: ["damaged at byte", str(hit.offset), str(next_header)],
        second.name: ["cut off inside", members[20].name, f"at byte {cut}"],
    }
    return shards, words, lost


def test_a_damaged_shard_is_refused_by_name_and_place(tiny, tmp_path, capsys):
    """Others train on the part before the damage and call it the corpus."""
    shards, words, _ = damaged_shards(tiny, tmp_path)
    first, second = words
    status = run("stage1_align", tiny, tmp_path / "runs", data__root=shards)
    refused(capsys, status, str(shards / first), *words[first], "and 1 more", "data.damaged=keep")
    assert not (tmp_path / "runs").exists()
    shutil.copy(tiny.shards / first, shards / first)
    status = run("stage1_align", tiny, tmp_path / "runs", data__root=shards)
    refused(capsys, status, str(shards / second), *words[second], "data.damaged=keep")


def test_of_a_damaged_shard_the_rest_is_kept_when_asked_for(tiny, tmp_path):
    shards, _, lost = damaged_shards(tiny, tmp_path)
    more = {"data__root": shards, "data__damaged": "keep", "run__length": "10 steps"}
    assert run("stage1_align", tiny, tmp_path / "runs", **more) == 0
    order = order_for("stage1_align", tiny, tmp_path / "runs", **more)
    trained = {key.split("/")[1] for keys in trained_keys(order.folder, order).values() for key in keys}
    assert not trained & lost
    whole = {f"tone{n}" for n in range(42)} - lost
    with_held_out = trained | {r.key for r in read_data(order.stage, make=False).corpora[0].held_out}
    assert with_held_out == whole  # behind the damage too
    lines = [json.loads(line) for line in (order.folder / "skipped.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in lines] == [("tone2", "no audio")]


def test_undecodable_and_empty_clips_are_skipped_and_counted(tiny, tmp_path, capsys):
    shards = tmp_path / "shards"
    shutil.copytree(tiny.shards, shards)
    good = flac(tone(1.0, 99))
    broken = good[:200] + bytes(len(good) - 200)  # the header promises a second, the frames are gone
    members = [("empty", b"", record(50)), ("noise", b"x" * 999, record(51)), ("broken", broken, record(52))]
    write_shard(shards / "tiny-000002.tar", [*members, ("good", good, record(53))])
    assert run("stage1_align", tiny, tmp_path / "runs", data__root=shards, run__length="12 steps") == 0
    folder = tmp_path / "runs/mini/stage1_align"
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    reasons = {(s["key"], s["reason"]) for s in skipped}
    assert {("empty", "undecodable"), ("noise", "undecodable"), ("broken", "undecodable")} <= reasons
    order = order_for("stage1_align", tiny, tmp_path / "runs", data__root=shards, run__length="12 steps")
    trained = {key for keys in trained_keys(folder, order).values() for key in keys}
    assert "tiny_caption/good" in trained
    assert not trained & {f"tiny_caption/{k}" for k in ("empty", "noise", "broken")}
    assert "undecodable" in capsys.readouterr().out  # the count stands in the summary


# -- what comes before -------------------------------------------------------------------------------------------------


def test_a_missing_stage_says_what_to_run_first(tiny, tmp_path, capsys):
    refused(capsys, run("stage2_pretrain", tiny, tmp_path / "runs"), "make stage1")
    refused(capsys, run("stage3_sft", tiny, tmp_path / "runs"), "make stage2")


def test_an_unfinished_parent_is_refused(tiny, runs, capsys):
    shutil.rmtree(runs / "mini/stage1_align/weights")
    refused(capsys, run("stage2_pretrain", tiny, runs), "not finished")


def test_weights_of_the_wrong_stage(tiny, runs, capsys):
    refused(capsys, run("stage3_sft", tiny, runs, "--from", "stage1_align"), "stage1_align", "stage2_pretrain")


def test_weights_that_were_changed(tiny, runs, capsys):
    file = runs / "mini/stage1_align/weights/model.safetensors"
    state = load_file(file)
    state["audio_encoder.norm.weight"][0] += 1
    save_file(state, file)
    refused(capsys, run("stage2_pretrain", tiny, runs), "sha256 differs")


def test_an_encoder_that_did_not_learn_is_refused(tiny, runs, capsys):
    """stage.json says that the encoder was trained, but it is what stage 1 started from."""
    weights = runs / "mini/stage1_align/weights"
    told = json.loads((weights / "stage.json").read_text())
    told["parts"]["audio_encoder"]["start"] = told["parts"]["audio_encoder"]["end"]
    (weights / "stage.json").write_text(json.dumps(told))
    refused(
        capsys, run("stage2_pretrain", tiny, runs), "audio_encoder is identical to what stage stage1_align started from"
    )


def test_missing_surplus_and_misshaped_tensors(tiny, runs, capsys):
    weights = runs / "mini/stage1_align/weights"
    told, state = json.loads((weights / "stage.json").read_text()), load_file(weights / "model.safetensors")

    def rewrite(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, weights / "model.safetensors")
        told["sha256"]["model.safetensors"] = sha256_file(weights / "model.safetensors")
        told["parts"] = {}
        (weights / "stage.json").write_text(json.dumps(told))

    norm = "audio_encoder.norm.weight"
    rewrite({n: t for n, t in state.items() if n != norm})
    refused(capsys, run("stage2_pretrain", tiny, runs), "lacks 1 tensors", norm)
    rewrite(state | {"audio_encoder.outputlayer.weight": torch.zeros(3)})
    refused(capsys, run("stage2_pretrain", tiny, runs), "no place for", "outputlayer")
    rewrite(state | {norm: torch.zeros(5)})
    refused(capsys, run("stage2_pretrain", tiny, runs), norm, "(5,)")


# -- run folders ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_with_other_settings_is_refused_not_skipped(tiny, runs, capsys):
    assert run("stage1_align", tiny, runs) == 0
    assert "is finished" in capsys.readouterr().out
    refused(capsys, run("stage1_align", tiny, runs, optim__lr=0.5), "optim.lr", "0.5", "NAME=", "FRESH=1")
    assert run("stage1_align", tiny, runs, log__every=3, hardware__workers=1, data__val_clips=2) == 0  # free to change


def test_fresh_trains_again_and_children_notice(tiny, runs, capsys):
    assert run("stage2_pretrain", tiny, runs) == 0
    assert run("stage1_align", tiny, runs, "--fresh", run__seed=7) == 0
    refused(capsys, run("stage2_pretrain", tiny, runs), "trained again since", "FRESH=1")
    assert run("stage2_pretrain", tiny, runs, "--fresh") == 0


def test_a_finished_run_on_other_data_is_refused(tiny, runs, tmp_path, capsys):
    shards = tmp_path / "shards"
    shutil.copytree(tiny.shards, shards)
    write_shard(shards / "tiny-000002.tar", [("new", flac(tone(1.0, 99)), record(60))])
    assert run("stage1_align", tiny, tmp_path / "moved", data__root=shards) == 0
    (shards / "tiny-000002.tar").unlink()
    refused(capsys, run("stage1_align", tiny, tmp_path / "moved", data__root=shards), "other data", "FRESH=1")


def test_a_decoder_of_another_tokenizer_is_refused(tiny, runs, tmp_path, capsys):
    """Token ids would mean other texts, and nothing else would notice."""
    other = tmp_path / "tokenizer"
    shutil.copytree(tiny.root / "tokenizer", other)
    content = json.loads((other / "tokenizer.json").read_text())
    a, b = list(content["model"]["vocab"])[-2:]
    vocabulary = content["model"]["vocab"]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(content))
    refused(capsys, run("stage2_pretrain", tiny, runs, tokenizer__path=other), "another tokenizer")


def test_fresh_with_a_mistake_leaves_the_old_run(tiny, runs, capsys):
    refused(capsys, run("stage1_align", tiny, runs, "--fresh", lora__targets="[query]"))
    assert (runs / "mini/stage1_align/weights/stage.json").is_file()


def test_name_and_from(tiny, runs):
    """Another run beside the first, and a stage 2 that starts from it."""
    assert run("stage1_align", tiny, runs, "--name", "other", run__seed=3) == 0
    assert run("stage2_pretrain", tiny, runs, "--name", "from_other", "--from", "other") == 0
    told = json.loads((runs / "mini/from_other/weights/stage.json").read_text())
    assert told["parents"][0]["from"].endswith("mini/other/weights")
    assert told["parents"][0]["stage"] == "stage1_align"


# -- what a run writes ------------------------------------------------------------------------------------------------------


def test_the_run_folder(tiny, stage1):
    folder = stage1 / "mini/stage1_align"
    rows = read_metrics(folder / "metrics.jsonl")
    assert rows[0]["step"] == 0
    assert "val_loss" in rows[0]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in rows if "val_loss" in r] == [0, 2, 4]
    keys = {"step", "loss", "lr", "grad_norm", "targets", "audio_s", "slots", "frames", "corpora", "languages"}
    keys |= {"skipped"}
    for row in (r for r in rows if "loss" in r):
        assert set(row) == keys
        corpus = row["corpora"]["tiny_caption"]
        assert corpus["targets"] == row["targets"] > 0
        assert corpus["loss_sum"] / corpus["targets"] == pytest.approx(row["loss"])
    told = json.loads((folder / "weights/stage.json").read_text())
    for name in ("stage", "parents", "sha256", "git_commit", "config_hash", "trained", "tokenizer"):
        assert told[name]
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml",
        "trainable.txt",
        "metrics.jsonl",
        "tensorboard",
        "ledger",
    }
    assert any((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert "# command line" in (folder / "config.yaml").read_text()
    assert "expected" in (folder / "trainable.txt").read_text()


def test_metrics_count_only_what_is_real(tiny, stage1):
    """Slots, frames, seconds and targets against the records that the ledger names."""
    order = order_for("stage1_align", tiny, stage1)
    data = read_data(order.stage, make=False)
    records = {r.key: r for r in training_records(data.corpora[0])}
    rows = [r for r in read_metrics(order.folder / "metrics.jsonl") if "loss" in r]
    for keys, row in zip(trained_keys(order.folder, order).values(), rows, strict=True):
        trained = [records[k.split("/")[1]] for k in keys]
        assert row["audio_s"] == pytest.approx(sum(r.n_samples for r in trained) / 16_000, abs=1e-2)
        assert row["frames"] == sum(r.frames for r in trained)
        assert row["slots"] <= data.budget.pack_slots * data.budget.packs_per_step


def test_speed_is_told_apart_from_what_is_the_same_on_every_run(tiny, stage1):
    rows = read_metrics(stage1 / "mini" / "stage1_align" / "speed.jsonl")
    rows = [row for row in rows if "validation_s" not in row]
    assert "measured" in rows[0]["peak"]
    assert [row["step"] for row in rows[1:]] == [1, 2, 3, 4]
    for row in rows[1:]:
        assert 0 < row["mfu"] < 1
        assert 0 <= row["waiting"] < 1
        assert 0 <= row["decoder_padding"] < 0.7
        assert row["audio_h_per_device_h"] > 0
    assert not any("mfu" in row for row in read_metrics(stage1 / "mini" / "stage1_align" / "metrics.jsonl"))


def test_only_the_encoder_of_stage_1_crosses(tiny, runs):
    """Stage 2: encoder of stage 1, decoder of the named source, a projector of its own."""
    slow = {"optim__lr": 1e-7, "optim__lr_for": "{'audio_projector.*': 1e-7, '*.lora_*': 1e-3}"}
    assert run("stage2_pretrain", tiny, runs, run__length="2 steps", **slow) == 0
    one = load_file(runs / "mini/stage1_align/weights/model.safetensors")
    two = load_file(runs / "mini/stage2_pretrain/weights/model.safetensors")
    text = load_file(tiny.root / "text_decoder/weights/model.safetensors")
    for name in two:
        if name.startswith("audio_encoder."):  # two steps at 1e-7 away from stage 1
            assert torch.allclose(two[name].float(), one[name].float(), atol=1e-6)
        if name.startswith("decoder."):
            assert torch.equal(two[name], text[name])
            assert name.endswith("norm.weight") or not torch.equal(two[name], one[name])
    projector = "audio_projector.net.0.weight"
    assert not torch.allclose(one[projector].float(), two[projector].float(), atol=1e-3)


def test_stage_3_takes_stage_2_whole(tiny, runs):
    """The LoRA of stage 2 goes on in the wider one; at a learning rate of 0 nothing else changes either."""
    assert run("stage2_pretrain", tiny, runs, run__length="3 steps") == 0
    zero = {"optim__lr": 0.0, "optim__lr_for": "{}", "optim__weight_decay": 0.0, "run__length": "2 steps"}
    with pytest.raises(AssertionError, match="was trained but did not change"):
        run("stage3_sft", tiny, runs, **zero)  # a stage whose optimizer does nothing must not pass for trained
    assert run("stage3_sft", tiny, runs, "--fresh", run__length="2 steps") == 0
    two = load_file(runs / "mini/stage2_pretrain/weights/adapter/adapter_model.safetensors")
    three = load_file(runs / "mini/stage3_sft/weights/adapter/adapter_model.safetensors")
    assert set(two) < set(three)
    for name in two:  # carried over: close to where stage 2 left it, far from a fresh B of zeros
        assert float((two[name] - three[name]).abs().max()) < 0.02
    moved = [n for n in two if "lora_B" in n and float(three[n].abs().max()) > 1e-4]
    assert moved


def test_lora_that_learned_nothing_is_not_handed_off(tiny, runs):
    """An adapter without effect looks like any other file."""
    with pytest.raises(AssertionError, match="every B is still zero"):
        run("stage2_pretrain", tiny, runs, optim__lr_for="{'*.lora_*': 0.0}")
    assert not (runs / "mini/stage2_pretrain/weights").exists()


def test_lora_targets_are_swapped_by_one_setting(tiny, runs):
    assert run("stage2_pretrain", tiny, runs, "--name", "qkvo", lora__targets="[q_proj,k_proj,v_proj,o_proj]") == 0
    adapter = json.loads((runs / "mini/qkvo/weights/adapter/adapter_config.json").read_text())
    assert {t.rsplit(".", 1)[1] for t in adapter["target_modules"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "LoRA o_proj" in (runs / "mini/qkvo/trainable.txt").read_text()


def finetuned(tiny: Tiny, runs: Path, monkeypatch, *argv: str, **more: object) -> int:
    """`make finetune` without make, in a folder of its own: the exit status."""
    here = runs.parent
    if not (here / "configs").exists():
        (here / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(here)
    ours = ("data.root", "data.manifests")  # the command's own
    settings = [s for s in tiny.settings(**more) if not s.startswith(ours)]
    monkeypatch.setattr("sys.argv", ["finetune", "--runs", str(runs), *argv, *settings])
    return finetune.main()


def write_table(folder: Path, rows: int = 24) -> Path:
    """A CSV of tones with a question about each, and a file that is not there."""
    folder.mkdir()
    lines = ["audio,question,answer"]
    for n in range(rows):
        (folder / f"{n}.flac").write_bytes(flac(tone(0.3 + 0.02 * n, n)))
        lines.append(f"{n}.flac,Is the number even?,{'no' if n % 2 else 'yes'}")
    (folder / "mine.csv").write_text("\n".join([*lines, "nowhere.flac,Is it?,yes"]) + "\n", encoding="utf-8")
    return folder / "mine.csv"


def test_from_a_table_to_a_tuned_model(tiny, runs, monkeypatch, capsys):
    """Every row is trained on, held out, or named; the model comes from stage 2 and has learned."""
    run_stage("stage2_pretrain", tiny, runs)
    table = write_table(runs.parent / "files")
    more = {"run__length": "3 epochs", "run__warmup": "1 steps"}
    assert finetuned(tiny, runs, monkeypatch, "--data", str(table), **more) == 0
    assert "25 rows: 24 written, 1 dropped" in capsys.readouterr().out
    folder = runs / "mini" / "finetune"
    stage = json.loads((folder / "weights" / "stage.json").read_text())
    assert [p["from"] for p in stage["parents"]] == [str(runs / "mini" / "stage2_pretrain" / "weights")]
    order = order_for(
        "finetune", tiny, runs, data__root="data/mine/shards", data__manifests="data/mine/manifests", data__mix="mine",
        **more,
    )  # fmt: skip
    trained = {key for keys in trained_keys(folder, order).values() for key in keys}
    held_out = {f"mine/{r.key}" for r in read_data(order.stage, make=False).corpora[0].held_out}
    assert len(trained | held_out) == 24
    assert held_out
    assert not trained & held_out
    losses = [row["val_loss"] for row in read_metrics(folder / "metrics.jsonl") if "val_loss" in row]
    assert losses[-1] < losses[0]
    # a second command takes up the finished shards, and what make prepare made is taken as it is
    before = {p.name: p.read_bytes() for p in Path("data/mine/shards").glob("*.tar")}
    again = ("--data", "data/mine", "--name", "again")
    assert finetuned(tiny, runs, monkeypatch, *again, **more | {"run__length": "2 steps"}) == 0
    assert before == {p.name: p.read_bytes() for p in Path("data/mine/shards").glob("*.tar")}
    assert finetuned(tiny, runs, monkeypatch, "--data", str(table), **more) == 0  # finished: nothing to do
    # --from: another run of stage 2, or one that was fine-tuned already
    shutil.copytree(runs / "mini" / "stage2_pretrain", runs / "mini" / "two")
    for origin in ("two", "again"):
        named = ("--data", "data/mine", "--name", f"after_{origin}", "--from", origin)
        assert finetuned(tiny, runs, monkeypatch, *named, run__length="2 steps") == 0
        stage = json.loads((runs / "mini" / f"after_{origin}" / "weights" / "stage.json").read_text())
        parents = [(p["from"], p["take"]) for p in stage["parents"]]
        assert parents == [(str(runs / "mini" / origin / "weights"), ["*"])]


def released(tiny: Tiny, folder: Path) -> AudioLM:
    """A folder as the published model's, at tiny sizes: shards, config, tokenizer, and code of its own named in both."""
    model = order_for("finetune", tiny, folder).stage.model
    e, d = model.encoder, model.decoder
    torch.manual_seed(1)
    lm = AudioLM(EncoderShape(e.dim, e.depth, e.heads), d.architecture, d.fields)
    lm.audio_encoder.init_bn.running_mean.fill_(-20.0)
    lm.audio_encoder.init_bn.running_var.fill_(200.0)
    shutil.copytree(tiny.root / "tokenizer", folder)
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in base_state(lm).items()}
    save_torch_state_dict(state, folder, max_shard_size="100KB")
    code = {"AutoConfig": "configuration_midashenglm.MiDashengLMConfig"}
    (folder / "config.json").write_text(
        json.dumps(released_config(lm, {"audio_token_id": 1}) | {"auto_map": code}, default=str)
    )
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"processor_class": "MiDashengLMProcessor"}))
    return lm


def test_the_published_model_is_tuned_by_one_setting(tiny, tmp_path, monkeypatch, capsys):
    """No run before it; its tokenizer is read without asking on the terminal whether to run its code."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    lm = released(tiny, tmp_path / "released")
    assert len(list((tmp_path / "released").glob("*.safetensors"))) > 2
    table, runs = write_table(tmp_path / "files"), tmp_path / "runs"
    one = {"start": f"[{{from: {tmp_path / 'released'}, take: ['*']}}]", "tokenizer__path": tmp_path / "released"}
    more = one | {"run__length": "3 steps", "optim__lr": 1e-6, "optim__lr_for": "{'*.lora_*': 1e-3}"}
    assert finetuned(tiny, runs, monkeypatch, "--data", str(table), **more) == 0
    weights = runs / "mini" / "finetune" / "weights"
    tuned = load_file(weights / "model.safetensors")
    for name, tensor in base_state(lm).items():
        assert torch.allclose(tuned[name].float(), tensor.bfloat16().float(), atol=1e-4), name
    stage = json.loads((weights / "stage.json").read_text())
    assert [(p["from"], p["take"]) for p in stage["parents"]] == [(str(tmp_path / "released"), ["*"])]
    again = ("--data", str(table), "--name", "again", "--from", "finetune")
    assert finetuned(tiny, runs, monkeypatch, *again, **{n: v for n, v in more.items() if n != "start"}) == 0
    other = one | {"model__decoder__fields__rope_parameters__rope_theta": 5e5}
    status = finetuned(tiny, runs, monkeypatch, "--data", str(table), "--name", "other", **other)
    refused(
        capsys,
        status,
        "rope_theta 1000000.0, this model 500000.0",
        "write model.decoder.fields.rope_parameters.rope_theta",
    )
    assert not (runs / "mini" / "other").exists()


@pytest.mark.parametrize(
    ("scale", "file"), [("0.6b", "dasheng_base.pt"), ("3b", "dasheng_06b.pt"), ("7b", "dasheng_06b.pt")]
)
def test_a_scale_without_weights_says_what_to_write(scale, file, tmp_path, monkeypatch, capsys):
    """Before billions of parameters are allocated, and before a million hours are indexed."""
    monkeypatch.setattr(AudioLM, "__init__", lambda *_: pytest.fail("a model was built"))
    monkeypatch.setattr("midasheng.train.fit.open_data", lambda *_, **__: pytest.fail("data was opened"))
    argv = ["--scale", scale, "--runs", str(tmp_path / "runs"), "hardware.devices=1"]
    refused(capsys, main(str(CONFIGS / "stage1_align.yaml"), stage1_align.contract, argv), "weights.encoder=", file)
    nowhere = [*argv, "weights.encoder=some-org/no-such-encoder"]
    status = main(str(CONFIGS / "stage1_align.yaml"), stage1_align.contract, nowhere)
    refused(capsys, status, "some-org/no-such-encoder", "the hub does not give it", "weights.encoder=PATH")
    nowhere = [*argv, "weights.encoder=no/such/encoder.pt"]
    status = main(str(CONFIGS / "stage1_align.yaml"), stage1_align.contract, nowhere)
    refused(capsys, status, "no/such/encoder.pt does not exist", "weights.encoder=PATH")
    assert not (tmp_path / "runs").exists()


def test_finetuning_refuses_what_stage_3_refuses(tiny, runs, monkeypatch, capsys):
    table = write_table(runs.parent / "files")
    status = finetuned(tiny, runs, monkeypatch, "--data", str(table))
    refused(capsys, status, "stage2_pretrain", "make stage2")
    run_stage("stage2_pretrain", tiny, runs)
    refused(capsys, finetuned(tiny, runs, monkeypatch, "--data", str(table), lora__targets="[]"), "lora.targets")
    decoder = finetuned(tiny, runs, monkeypatch, "--data", str(table), train="[decoder.*]")
    refused(capsys, decoder, "the decoder is frozen")
    refused(capsys, finetuned(tiny, runs, monkeypatch, "--data", "nothing.csv"), "nothing.csv is not there")
    other = table.with_name("other.csv")
    other.write_text("audio,answer\n" + "".join(f"{n}.flac,{n}\n" for n in range(24)))
    refused(capsys, finetuned(tiny, runs, monkeypatch, "--data", str(other)), "say what to ask", "PROMPT=")
    more = {"run__length": "2 steps"}
    assert finetuned(tiny, runs, monkeypatch, "--data", str(other), "--prompt", "Which?", **more) == 0  # mended
    assert yaml.safe_load(Path("data/other/corpora/other.yaml").read_text())["prompts"] == ["Which?"]


def test_finetuning_prepares_once_and_as_it_is_told(tiny, runs, monkeypatch, capsys):
    """TASK and COLUMNS reach it; Ctrl-C is no traceback."""
    table = write_table(runs.parent / "files").with_name("said.csv")
    table.write_text("sound,answer\n" + "".join(f"{n}.flac,tone {n}\n" for n in range(24)))
    said = ("--data", str(table), "--task", "caption", "--columns", "audio=sound")
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "ordered", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert finetuned(tiny, runs, monkeypatch, *said) == 130
    assert "the same command goes on" in capsys.readouterr().err
    refused(capsys, finetuned(tiny, runs, monkeypatch, *said), "there is no run")  # prepared, but no stage 2
    assert yaml.safe_load(Path("data/said/corpora/said.yaml").read_text())["task"] == "caption"


def test_ablations_run(tiny, tmp_path):
    for name in ("stage1_frozen_decoder", "stage1_lora"):
        path = str(CONFIGS / "ablations" / f"{name}.yaml")
        assert run("stage1_align", tiny, tmp_path, "--config", path) == 0
        assert (tmp_path / "mini" / name / "weights/stage.json").is_file()


def test_an_audio_file_is_what_it_says(tiny):
    """The fixtures themselves: 16 kHz mono FLAC."""
    info = soundfile.info(__import__("io").BytesIO(flac(tone(0.5, 1))))
    assert (info.samplerate, info.channels, info.frames) == (16_000, 1, 8_000)
