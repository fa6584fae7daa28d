"""The probe tells what stands in features and nothing else; its encoders are those of the run; xares takes ours."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from midasheng.config import UserError
from midasheng.evaluate import probe
from midasheng.evaluate.probe import Task, linear, neighbours, read_tasks, ridge
from midasheng.evaluate.xares import MidashengEncoder
from midasheng.model.sources import open_source
from stages import probe as command_room
from tests.conftest import flac, run_stage, write_shard


def blobs(n: int, classes: int, apart: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, 16) around a centre for each class, and their classes."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=draw)
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(99))
    return apart * centres[y] + torch.randn(n, 16, generator=draw), y


HEADS = {"knn": lambda train, valid, x, c: neighbours(*train, x, c), "linear": linear, "ridge": ridge}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_tells_classes_that_lie_apart_and_guesses_where_there_are_none(head):
    train, valid, test = (blobs(n, 4, 3.0, seed) for n, seed in ((2_000, 0), (60, 1), (200, 2)))
    assert (HEADS[head](train, valid, test[0], 4) == test[1]).double().mean() > 0.94
    train, valid, test = (blobs(n, 4, 0.0, seed) for n, seed in ((2_000, 0), (60, 1), (200, 2)))
    assert 0.1 < (HEADS[head](train, valid, test[0], 4) == test[1]).double().mean() < 0.45


def test_neighbours_vote_by_similarity():
    """Against X-ARES's rule written out: one near neighbour outweighs two far ones."""
    angle = torch.tensor([0.0, 0.9, 0.9])
    train = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([[5.0], [1.0], [0.1]])  # length is nothing
    labels = torch.tensor([0, 1, 1])
    at = torch.tensor([[0.05]])
    test = torch.cat([at.cos(), at.sin()], 1)
    weights = F.softmax(F.cosine_similarity(train, test) / 0.07, 0)
    assert weights[0] > weights[1] + weights[2]
    assert neighbours(train, labels, test, 2).tolist() == [0]


def test_the_head_is_that_of_the_best_epoch_in_validation():
    """With validation labels turned round, the first epochs win."""
    train, test = blobs(640, 2, 3.0), blobs(200, 2, 3.0, 2)
    good = linear(train, blobs(60, 2, 3.0, 1), test[0], 2)
    x, y = blobs(60, 2, 3.0, 1)
    bad = linear(train, (x, 1 - y), test[0], 2)
    assert (good == test[1]).sum() > (bad == test[1]).sum() or not torch.equal(good, bad)


# -- tars --------------------------------------------------------------------------------------------------------------


def tones(folder: Path, name: str, numbers: range) -> None:
    """High tones and low ones in noise, three clips of each source; and one without the label."""
    members = []
    for n in numbers:
        rng = np.random.default_rng(n)
        pitch = ("low", "high")[n // 3 % 2]
        wave = np.sin(2 * np.pi * (300 if pitch == "low" else 3000) * np.arange(6_000) / 16_000)
        wave = (0.1 * wave + 0.02 * rng.standard_normal(6_000)).astype(np.float32)
        content = {"pitch": pitch, "source": f"s{n // 3}", "parity": str(n % 2)} if n % 10 else {"source": "none"}
        members.append((f"{name}{n}", flac(wave), content))
    write_shard(folder / f"{name}-000000.tar", members)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    tones(folder, "train", range(90))
    tones(folder, "test", range(90, 120))
    for fold in (1, 2, 3):
        tones(folder, f"wds-audio-fold-{fold}", range(30 * fold, 30 * fold + 30))
    return folder


@pytest.fixture(scope="module")
def encoder() -> probe.DashengEncoder:
    torch.manual_seed(0)
    made = probe.DashengEncoder(probe.EncoderShape(32, 2, 2)).eval()
    made.init_bn.running_mean.fill_(-40.0)
    made.init_bn.running_var.fill_(400.0)
    return made


@pytest.mark.parametrize(
    ("keys", "clips"),
    [
        ({"train": "train-*.tar", "test": "test-*.tar"}, 27),
        ({"train": "train-*.tar", "held_out": 0.3}, None),
        ({"folds": "wds-audio-fold-{1..3}-*.tar"}, 81),
    ],
)
def test_pitch_is_told_and_parity_is_not(keys, clips, shards, encoder, tmp_path):
    (tmp_path / "t.yaml").write_text(json.dumps({"tasks": {n: {**keys, "label": n} for n in ("pitch", "parity")}}))
    tasks, root = read_tasks(tmp_path / "t.yaml", shards)
    pitch, parity = probe.probe({"own": encoder}, tasks, root)
    assert clips in (None, len(pitch.labels))
    for told in (pitch, parity):
        assert set(told.right) == {(e, h) for e in ("own", probe.MEL) for h in probe.HEADS}
    assert pitch.number("knn", "own").value > 0.9
    assert pitch.number("ridge", "own").value > 0.9
    assert 0.2 < parity.number("knn", "own").value < 0.8
    assert pitch.number("knn", "own", "own").value == 0
    low, high = pitch.number("knn", "own").interval()
    assert low <= pitch.number("knn", "own").value <= high
    table = probe.table([pitch], [probe.MEL, "own"], {"own": probe.MEL})
    assert "gained" in table


def test_no_source_is_on_two_sides(shards):
    task = Task("pitch", "pitch", train=("train-*.tar",), held_out=0.3)
    (split,) = probe.splits(task, shards)
    sides = [{r.source for r in part} for part in (split.train, split.valid, split.test)]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert len(split.train) + len(split.valid) + len(split.test) == 81  # the others have no label
    one, *_ = probe.splits(Task("f", "pitch", folds=tuple(f"wds-audio-fold-{k}-*.tar" for k in (1, 2, 3))), shards)
    assert {r.shard.name for r in one.test} == {"wds-audio-fold-1-000000.tar"}
    assert len({r.shard.name for r in one.train}) == 2
    assert (
        len(probe.splits(Task("pitch", "pitch", train=("train-*.tar",), held_out=0.3, most=20), shards)[0].train) < 20
    )


def test_a_clip_is_encoded_as_alone(encoder, shards):
    """Mean frames in a batch are those of each clip alone: no padding, and in their own place."""
    clips = [
        torch.from_numpy(np.random.default_rng(n).standard_normal(n).astype(np.float32)) for n in (3_200, 9_000, 4_000)
    ]
    together = probe.means({"own": encoder}, clips)["own"]
    for clip, row in zip(clips, together, strict=True):
        torch.testing.assert_close(probe.means({"own": encoder}, [clip])["own"][0], row)
        with torch.no_grad():
            torch.testing.assert_close(encoder(clip, [len(clip)]).mean(0), row)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pitch": {"label": "pitch", "train": "gone-*.tar", "test": "test-*.tar"}}, "holds no gone"),
        ({"pitch": {"label": "pitch", "train": "train-*.tar"}}, "nothing to test on"),
        ({"pitch": {"train": "train-*.tar", "test": "test-*.tar"}}, "write `label:`"),
        ({"pitch": {"label": "pitch", "trian": "train-*.tar"}}, "did you mean `train`"),
        ("x", "write `tasks:`"),
    ],
)
def test_mistakes_in_a_file_of_tasks(content, message, shards, tmp_path):
    (tmp_path / "t.yaml").write_text(json.dumps({"tasks": content}))
    with pytest.raises(UserError, match=message):
        read_tasks(tmp_path / "t.yaml", shards)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny, shards, tmp_path_factory) -> Path:
    """Two stages, the first probed at its end."""
    root = tmp_path_factory.mktemp("runs")
    tasks = root / "tasks.yaml"
    tasks.write_text(
        json.dumps(
            {"root": str(shards), "tasks": {"pitch": {"train": "train-*.tar", "test": "test-*.tar", "label": "pitch"}}}
        )
    )
    run_stage("stage1_align", tiny, root, data__probe=tasks)
    run_stage("stage2_pretrain", tiny, root)
    return root


def test_a_run_is_probed_beside_what_it_started_from(runs, capsys, monkeypatch):
    first = json.loads((runs / "mini" / "stage1_align" / "probe.json").read_text())
    found = first["tasks"]["pitch"]
    assert list(found["right"]) == [probe.MEL, "untrained", "stage1_align"]
    gained = found["right"]["stage1_align"]["knn"]["value"] - found["right"]["untrained"]["knn"]["value"]
    assert found["gained"]["knn"]["value"] == pytest.approx(gained)
    one, two = (runs / "mini" / name for name in ("stage1_align", "stage2_pretrain"))
    untrained, where = probe.started_from(one)
    assert where == "untrained"
    parent, where = probe.started_from(two)
    assert where.endswith("stage1_align/weights")
    ours = probe.encoder_of(str(one))
    assert all(torch.equal(a, b) for a, b in zip(parent.state_dict().values(), ours.state_dict().values(), strict=True))
    moved = [n for n, t in untrained.state_dict().items() if not torch.equal(t, ours.state_dict()[n])]
    assert "blocks.0.attn.qkv.weight" in moved
    assert not [n for n in moved if "running" in n]

    monkeypatch.setattr(
        sys,
        "argv",
        ["probe", "--runs", str(runs), "--name", "stage1_align,stage2_pretrain", "--tasks", str(runs / "tasks.yaml")],
    )
    assert command_room.main() == 0
    said = capsys.readouterr().out
    assert "untrained" in said
    assert said.count("gained") == 2
    assert (two / "probe.json").is_file()


def test_an_untrained_encoder_that_is_not_the_one_is_refused(runs, monkeypatch):
    """Another seed, or another torch, would make a start that the run never had."""
    right = probe.counter_seed
    monkeypatch.setattr(probe, "counter_seed", lambda seed, *rest: right(seed + 1, *rest))
    with pytest.raises(UserError, match="is not the one it started from"):
        probe.started_from(runs / "mini" / "stage1_align")


def test_labels_that_are_not_there_are_found_before_training(tiny, tmp_path):
    with pytest.raises(UserError, match=r"data.probe: .*holds no asterisk"):
        run_stage("stage1_align", tiny, tmp_path, data__probe="data_manifests/probe/mini.yaml")
    assert not (tmp_path / "mini").exists()


# -- xares -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1_000, 50_000, 16_000 * 11])
def test_the_adapter_gives_what_xares_asks_for(runs, samples, monkeypatch):
    monkeypatch.setenv("MIDASHENG", str(runs / "mini" / "stage1_align"))
    made = MidashengEncoder()
    assert (made.sampling_rate, made.output_dim, made.hop_size_in_ms) == (16_000, 32, 40)
    audio = 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(0))
    out = made(audio)
    assert out.shape == (2, max(samples, 3_200) // 640 + (max(samples, 3_200) // 160 % 4 == 3), 32)
    torch.testing.assert_close(made(audio[1])[0], out[1])  # neighbours in a batch do not matter
    assert torch.equal(
        made.encoder.norm.weight, open_source(str(runs / "mini" / "stage1_align")).read("audio_encoder.norm.weight")
    )


def test_the_xares_package_takes_the_adapter(runs, monkeypatch):
    checker = pytest.importorskip("xares.audio_encoder_checker")
    assert checker.check_audio_encoder(MidashengEncoder(str(runs / "mini" / "stage1_align")))


def test_an_adapter_without_weights_says_so(monkeypatch):
    monkeypatch.delenv("MIDASHENG", raising=False)
    with pytest.raises(UserError, match="MIDASHENG is not set"):
        MidashengEncoder()
