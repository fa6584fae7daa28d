"""A stage says whether it listens: the same answers with another clip, and of the decoder alone, paired and clustered."""

import copy
import io
import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from midasheng.data import audio, held_out
from midasheng.data.audio import Skip
from midasheng.data.held_out import ALIKE, KINDS, NONE, OTHER, OWN, HeldOutSet
from midasheng.data.manifest import read_mix
from midasheng.data.plan import budget
from midasheng.evaluate.rows import Row
from midasheng.model import adapt
from midasheng.model.audio_lm import AudioLM
from midasheng.model.generate import Continuation, generate
from midasheng.sample import NO_TARGET, Pack
from midasheng.train import listening
from midasheng.train.listening import ListeningTest, Paired, answer_table, paired, verdict
from midasheng.train.meter import read_metrics
from midasheng.train.module import StageModule, Stopped
from midasheng.train.progress import ending
from tests.conftest import Tiny, flac, open_index, order_for, record, run_stage, tone, training_records, write_shard
from tests.model import tiny_lm
from tests.train.test_resume import stop_after

SETS = ("pretrain", "sft")
FIELDS = list(Row.__dataclass_fields__)  # those of an evaluation
HEARD = ("listening", "alike", "text_only")


def same(tensor: Tensor) -> Tensor:
    """The sum over one rank."""
    return tensor


# -- the difference and its standard error ----------------------------------------------------------------------------


def table(*rows: tuple[float, int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_the_difference_is_a_ratio_of_sums_and_its_error_that_of_clusters():
    low = table((2, 1), (4, 3), (9, 4))
    high = table((5, 1), (4, 3), (13, 4))  # 3, 0 and 4 more; in clusters 3 of 4 targets and 4 of 4
    found = paired(low, high, ["a", "a", "b"])
    difference = 7 / 8  # not the mean over samples, 4 / 3, nor over clusters' means
    residuals = [3 - difference * 4, 4 - difference * 4]
    se = math.sqrt(sum(r**2 for r in residuals) * 2 / 1) / 8
    assert (found.difference, found.se, found.samples) == (pytest.approx(difference), pytest.approx(se), 3)
    back = paired(high, low, ["a", "a", "b"])
    assert back.difference == pytest.approx(-difference)
    assert not back.sure


@pytest.mark.parametrize("together", [0.0, 1.0], ids=["independent", "samples of a clip alike"])
def test_the_standard_error_is_that_of_a_bootstrap_over_clips(together):
    """Three samples a clip that share what they cost: taken for independent, the error would be far too small."""
    rng = np.random.default_rng(1)
    clips, each = 150, 3
    targets = rng.integers(1, 30, (clips, each)).astype(float)
    share = 0.4 + together * rng.standard_normal((clips, 1)) + (1 - together) * rng.standard_normal((clips, each))
    more = share * targets
    low = table(*((50.0, int(t)) for t in targets.ravel()))
    high = low + torch.from_numpy(np.stack([more.ravel(), np.zeros(clips * each)], 1))
    names = [f"clip {c}" for c in range(clips) for _ in range(each)]
    found = paired(low, high, names)
    drawn = rng.integers(0, clips, (4_000, clips))
    boot = more.sum(1)[drawn].sum(1) / targets.sum(1)[drawn].sum(1)
    assert found.difference == pytest.approx(more.sum() / targets.sum())
    assert found.se == pytest.approx(boot.std(), rel=0.08)
    alone = paired(low, high, [f"{n}" for n in range(clips * each)])
    assert alone.se < 0.72 * found.se if together else alone.se == pytest.approx(found.se, rel=0.15)


def test_samples_without_a_counterpart_are_left_out():
    low, high = table((2, 2), (5, 1), (0, 0), (3, 1)), table((3, 2), (0, 0), (7, 1), (6, 1))
    found = paired(low, high, ["a", "b", "c", "d"])
    assert found == paired(low[[0, 3]], high[[0, 3]], ["a", "d"])
    assert (found.difference, found.samples) == (pytest.approx(4 / 3), 2)


def test_fewer_than_two_clips_are_no_test():
    low, high = table((2, 2), (5, 1)), table((3, 2), (9, 1))
    assert paired(low, high, ["a", "a"]) is None
    assert paired(low, table((3, 2), (0, 0)), ["a", "b"]) is None
    assert paired(low[:0], high[:0], []) is None
    assert paired(low, high, ["a", "b"]) is not None


@pytest.mark.parametrize(
    ("difference", "se", "sure"),
    [(0.31, 0.1, True), (0.29, 0.1, False), (-0.5, 0.1, False), (0.0, 0.0, False), (math.nan, 0.1, False)],
)
def test_sure_is_three_standard_errors_above_zero(difference, se, sure):
    assert Paired(difference, se, 9).sure == sure


# -- a model with LoRA that acts, on the tiny corpus ------------------------------------------------------------------


def held_out_sets(tiny: Tiny, chat, mixes=SETS, most: int = 6) -> list[HeldOutSet]:
    sets = []
    for mix in mixes:
        read = read_mix(mix, tiny.manifests)
        corpora = [open_index(c, tiny.shards, chat, clips="told" if mix == "text" else "heard") for c in read.cards]
        shape = budget(
            corpora, read.percent, kind="report", clips_per_step=6, packs_per_step=2, pack_slots=0, pack_frames=0
        )
        sets.append(HeldOutSet(mix, corpora, chat, shape, most))
    return sets


@pytest.fixture(scope="module")
def models() -> tuple[AudioLM, AudioLM]:
    """A model before it got its LoRA, and with a LoRA that changes what it says; both in eval mode."""
    before = tiny_lm(vocab_size=512, hidden_size=48).eval()
    after = copy.deepcopy(before)
    adapt.freeze_all_but(after, ["audio_encoder.*", "audio_projector.*"])
    adapt.add_lora(after, adapt.LoraPlan(("all-linear",), 2, 8.0, 0.5), seed=1)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in adapt.lora_state(after).items():
            if "lora_B" in name:
                tensor += 0.3 * torch.randn(tensor.shape, generator=draw)
    return before, after.eval()


@torch.no_grad()
def one_by_one(model: AudioLM, asked: HeldOutSet, kind: str) -> Tensor:
    """(loss sum, targets) of each asked sample, each in a pack of its own."""
    alone = replace(asked.budget, pack_slots=1_000)
    sums = torch.zeros(len(asked.asked), 2, dtype=torch.float64)
    for number, a in enumerate(asked.asked):
        if asked._clip_of(a, kind) is not None:
            single = HeldOutSet(asked.name, asked.corpora, asked.chat, alone, 0)
            single.asked = [a]
            ((_, pack),) = single.packs(kind)
            sums[number] = torch.tensor([float(model(pack).double().sum()), sum(pack.targets)])
    return sums


@pytest.fixture(scope="module")
def sets(tiny_data, chat) -> list[HeldOutSet]:
    return held_out_sets(tiny_data, chat)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_each_sample_asked_alone(models, sets, tmp_path, kind):
    test = ListeningTest(sets, tmp_path, 0)
    for asked in sets:
        with torch.no_grad():
            found = test.losses(models[1], asked, kind, 0, 1, same)
        expected = one_by_one(models[1], asked, kind)
        assert torch.equal(found[:, 1], expected[:, 1])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found[:, 1] > 0).tolist() == [asked._clip_of(a, kind) is not None for a in asked.asked]
        assert len(found) > 5


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_add_up_to_the_losses_of_one(models, sets, tmp_path, world):
    test = ListeningTest(sets, tmp_path, 0)
    with torch.no_grad():
        for kind in (OWN, OTHER, NONE):
            whole = test.losses(models[1], sets[0], kind, 0, 1, same)
            parts = [test.losses(models[1], sets[0], kind, rank, world, same) for rank in range(world)]
            assert torch.equal(sum(parts), whole)
            assert sum(bool((p[:, 1] > 0).any()) for p in parts) > 1
            assert torch.equal(test.losses(models[1], sets[0], kind, 0, 1, lambda t: 3 * t), 3 * whole)


def test_text_only_is_the_decoder_as_it_was_without_its_lora_and_without_a_clip(models, sets, tmp_path):
    base, lora = models
    for asked in sets:
        ListeningTest([asked], tmp_path, 0).before(lora, 0, 1, same)
        told = json.loads((tmp_path / "text_only.json").read_text())
        assert told["answers"] == {}
        assert len(told["losses"]) == len(asked.asked)
        expected, other = one_by_one(base, asked, NONE), one_by_one(lora, asked, NONE)
        found = ListeningTest([asked], tmp_path, 0)._text_only(asked)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert ((found - other)[:, 0].abs() > 0.1).all()  # the LoRA would show
        assert ((found - one_by_one(base, asked, OWN))[:, 0].abs() > 1e-3).all()  # and so would the clip
    with torch.no_grad():
        back = ListeningTest(sets, tmp_path, 0).losses(lora, sets[0], NONE, 0, 1, same)
    torch.testing.assert_close(back, one_by_one(lora, sets[0], NONE), rtol=1e-4, atol=1e-4)  # LoRA acts again


def test_the_row_holds_sums_and_pairs_of_the_same_samples(models, sets, tmp_path):
    base, lora = models
    test = ListeningTest(sets, tmp_path, 0)
    test.before(lora, 0, 1, same)
    row = test.row(lora, 0, 1, same, ends=True)
    assert row["also"].keys() == {"sft"}
    for asked, found in zip(sets, (row, row["also"]["sft"]), strict=True):
        listens = asked is sets[0]  # of the others the loss alone
        own = one_by_one(lora, asked, OWN)
        keys = [a.record.key for a in asked.asked]
        against = {
            "listening": one_by_one(lora, asked, OTHER), "alike": one_by_one(lora, asked, ALIKE),
            "text_only": one_by_one(base, asked, NONE),
        }  # fmt: skip
        assert found["val_loss"] == pytest.approx(float(own[:, 0].sum() / own[:, 1].sum()), rel=1e-4)
        assert found["targets"] == int(own[:, 1].sum())
        of = [a.corpus for a in asked.asked]
        assert ("listening" in found) == listens
        for kind, other in against.items() if listens else ():
            assert found[kind] == pytest.approx(vars(paired(own, other, keys)), rel=1e-2, abs=1e-4)
            for number, corpus in enumerate(asked.corpora):
                mine = [i for i, c in enumerate(of) if c == number]
                part = found["corpora"][corpus.card.name]
                expected = paired(own[mine], other[mine], [keys[i] for i in mine])
                if expected is None:
                    assert part[kind] is None
                else:
                    assert part[kind] == pytest.approx(vars(expected), rel=1e-2, abs=1e-4)
        for number, corpus in enumerate(asked.corpora):
            mine = [i for i, c in enumerate(of) if c == number]
            part = found["corpora"][corpus.card.name]
            assert part["loss_sum"] == pytest.approx(float(own[mine, 0].sum()), rel=1e-4)
            assert part["targets"] == int(own[mine, 1].sum())
        groups = {
            "languages": [a.record.alike for a in asked.asked],  # in these cards the language
            "tasks": [asked.corpora[a.corpus].card.name.removeprefix("tiny_") for a in asked.asked],
        }  # fmt: skip
        for group, names in groups.items():
            assert found[group].keys() == set(names)
            for name, part in found[group].items():
                mine = [i for i, its in enumerate(names) if its == name]
                assert part["loss_sum"] == pytest.approx(float(own[mine, 0].sum()), rel=1e-4)
                assert part["targets"] == int(own[mine, 1].sum())
                if listens:
                    pair = paired(own[mine], against["listening"][mine], [keys[i] for i in mine])
                    assert part["listening"] == (pair and pytest.approx(vars(pair), rel=1e-2, abs=1e-4))
    assert row["listening"]["samples"] == 12
    assert "also" not in test.row(lora, 0, 1, same, ends=False)
    between = test.row(lora, 0, 1, same, ends=False)
    assert not {"alike", "text_only"} & (between.keys() | between["corpora"]["tiny_asr"].keys())
    assert between["listening"] == row["listening"]


def test_validation_loss_is_over_targets_not_a_mean_of_means(models, sets, tmp_path):
    """Corpora with answers of very different lengths."""
    row = ListeningTest(sets, tmp_path, 0).row(models[1], 0, 1, same, ends=False)
    corpora = row["corpora"].values()
    assert row["val_loss"] == pytest.approx(sum(c["loss_sum"] for c in corpora) / sum(c["targets"] for c in corpora))
    means = [c["loss_sum"] / c["targets"] for c in corpora]
    assert abs(row["val_loss"] - sum(means) / len(means)) > 1e-3


def test_a_set_without_clips_has_a_validation_loss_and_nothing_else(models, tiny_data, chat, tmp_path):
    test = ListeningTest(held_out_sets(tiny_data, chat, ("text",)), tmp_path, 2)
    test.before(models[1], 0, 1, same)
    row = test.row(models[1], 0, 1, same, ends=True)
    assert row.keys() == {"val_loss", "targets", "corpora", "tasks", "languages"}
    assert verdict({"step": 4, **row}) == []


def test_answers_in_words_with_and_without_hearing(models, sets, tmp_path, monkeypatch):
    """Whoever hears a clip says its length; the decoder alone, asked before, says nothing of it."""
    lora = models[1]
    asked_of = []

    def generate(lm, prompts, stops, limit):
        scaled = [m.scaling["default"] for m in lm.modules() if hasattr(m, "lora_A")]
        asked_of.append(bool(scaled and any(scaled)))
        assert stops == [sets[0].chat.im_end]
        texts = [f"{n}" for n in prompts.clips] or ["deaf"] * len(prompts.segments)
        return [Continuation(sets[0].chat.text(text), "stop", 0.0) for text in texts]

    monkeypatch.setattr(listening, "generate", generate)
    test = ListeningTest(sets, tmp_path, 3, 5)
    test.before(lora, 0, 1, same)
    assert asked_of
    assert not any(asked_of)
    asked_of.clear()
    rows = test.answer(lora, 7, 0, 1, same, end=True)
    assert all(asked_of)
    records = {(c.card.name, r.key): r for s in sets for c in s.corpora for r in c.held_out}
    closed, free = [r for r in rows if "text_only" in r], [r for r in rows if "text_only" not in r]
    assert {(r["mix"], r["corpus"]) for r in closed} == {("sft", "tiny_qa")}
    assert len(closed) == 2 * 3  # which language, is it even
    for row in closed:
        assert row["text_only"] == "deaf"
        assert row["references"][0] in row["choices"]
    assert {(r["mix"], r["corpus"]) for r in free} == {(s.name, c.card.name) for s in sets for c in s.corpora}
    assert len({r["id"] for r in rows}) == len(rows)
    assert all(r["clip"] == "/".join(r["id"].split("/")[1:-1]) for r in rows)  # corpus/key of mix/corpus/key/variant
    cards = {c.card.name: c.card for s in sets for c in s.corpora}
    for row in rows:
        record = records[row["corpus"], row["key"]]
        assert list(row)[:11] == ["step", *FIELDS]
        assert (row["step"], row["task"]) == (7, cards[row["corpus"]].task)
        assert (row["output"], row["new_tokens"]) == (f"{record.n_samples}", len(sets[0].chat.text(row["output"])))
        answered = [v.turns[1].text for v in record.variants if v.turns[0].text == row["prompt"]]
        assert sorted(row["references"]) == sorted(answered)
        assert row["references"][0] == answered[0] or len(answered) > 1
    few = test.answer(lora, 3, 0, 1, same, end=False)
    assert [r["id"] for r in few] == [r["id"] for r in free if r["mix"] == "pretrain"]  # its own mix, the same ones
    assert len(few) == 5
    assert ListeningTest(sets, tmp_path, 0).answer(lora, 3, 0, 1, same, end=True) == []


def test_all_ranks_ask_what_the_first_one_found_to_be_closed(tiny_data, chat, tmp_path, monkeypatch):
    """Where one of them cannot read, others would wait for its answers for ever."""
    sent = []

    def broadcast(told):
        sent.extend(told if told[0] else ())
        told[:] = sent

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    first, second = (held_out_sets(tiny_data, chat, ("pretrain", "sft")) for _ in range(2))
    ListeningTest(first, tmp_path, 3)._agree(0)
    asked = [q for s in first for q in s.closed(3)]
    assert asked
    monkeypatch.setattr(held_out.HeldOutSet, "_training", lambda self, corpus: iter(()))
    ListeningTest(second, tmp_path, 3)._agree(1)
    assert [q for s in second for q in s.closed(3)] == asked


@pytest.mark.parametrize("world", [2, 20])
def test_ranks_share_the_answers_and_none_depends_on_their_number(models, sets, tmp_path, monkeypatch, world):
    """No rank answers alone; what they say together are the rows of one process."""
    monkeypatch.setattr(held_out, "TOGETHER", 2)
    monkeypatch.setattr(listening, "LONGEST", 6)
    test = ListeningTest(sets, tmp_path, 2, 4)
    test.before(models[1], 0, 1, same)
    whole = test.answer(models[1], 0, 0, 1, same, end=True)
    busy, sums = Counter(), {}

    def of_rank(rank: int) -> Callable[[Tensor], Tensor]:
        calls = itertools.count()

        def add(tensor: Tensor) -> Tensor:
            busy[rank] += int(tensor.any())
            call = next(calls)
            sums[call] = sums.get(call, 0) + tensor
            return sums[call]

        return add

    for rank in range(world):
        together = test.answer(models[1], 0, rank, world, of_rank(rank), end=True)
    assert [r | {"seconds": 0} for r in together] == [r | {"seconds": 0} for r in whole]
    assert len(whole) > 8
    assert any(r["output"] for r in whole)
    assert sum(n > 0 for n in busy.values()) > 1


def test_an_answer_to_a_clip_that_cannot_be_decoded_is_none_and_says_so(models, sets, tmp_path, monkeypatch):
    asked = sets[0].open(4)
    lost = asked[1].record.n_samples

    def decode(data: bytes, n_samples: int):
        if n_samples == lost:
            raise Skip("damaged")
        return audio.decode(data, n_samples)

    monkeypatch.setattr(held_out, "decode", decode)
    rows = ListeningTest(sets, tmp_path, 0, 4).answer(models[1], 0, 0, 1, same, end=False)
    gone = [r for a, r in zip(asked, rows, strict=True) if a.record.n_samples == lost]
    assert gone
    assert all((r["output"], r["new_tokens"], r["finish_reason"]) == (None, 0, "unread") for r in gone)
    assert all(r["finish_reason"] in ("stop", "length") for r in rows if r not in gone)


def test_only_the_first_rank_writes_and_no_answers_are_asked_for_unless_wanted(models, sets, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(listening, "generate", lambda *_: pytest.fail("nobody asked"))
        ListeningTest(sets, tmp_path, 0).before(models[1], 0, 1, same)
    (tmp_path / "text_only.json").unlink()
    monkeypatch.setattr(listening, "LONGEST", 2)
    ListeningTest(sets, tmp_path, 3).before(models[1], 1, 2, same)
    assert not (tmp_path / "text_only.json").exists()


def test_an_answer_is_made_where_the_model_is(models, sets, monkeypatch):
    """The prompt comes from the host; on a GPU it must be moved there."""

    class Seen(Exception):
        pass

    def text(self, pack: Pack):
        assert {pack.ids_T.device.type, pack.is_audio_T.device.type, pack.audio_L.device.type} == {"meta"}
        raise Seen

    monkeypatch.setattr(AudioLM, "text", text)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # does not know the meta device
    _, prompts = next(sets[1].prompts(sets[1].asked, OWN))
    with pytest.raises(Seen):
        generate(copy.deepcopy(models[0]).to("meta"), prompts, [], 3)


# -- what is said at the end ------------------------------------------------------------------------------------------


def last_row(listening: tuple | None, alike: tuple | None = None, text: tuple | None = None) -> dict:
    def made(p: tuple | None) -> dict | None:
        return p and {"difference": p[0], "se": p[1], "samples": 9}

    pairs = {"listening": made(listening), "alike": made(alike), "text_only": made(text)}
    corpora = {"tiny": {"loss_sum": 30.0, "targets": 10, **pairs}}
    return {"step": 9, "val_loss": 3.0, "targets": 10, **pairs, "corpora": corpora}


def test_a_stage_that_does_not_listen_is_told_loudly():
    for deaf in ((0.0, 0.0), (0.2, 0.1), (-1.0, 0.1), (math.nan, 0.1)):
        lines = verdict(last_row(deaf, (0.5, 0.1), (0.5, 0.1)))
        assert sum("WARNING: THIS STAGE DOES NOT LISTEN" in line for line in lines) == 1
    lines = verdict(last_row((0.4, 0.1), (0.3, 0.1), (1.0, 0.1)))
    assert not any("WARNING" in line for line in lines)
    text = "\n".join(lines)
    assert "+0.400 +- 0.100 nats a target (9 samples)" in text
    assert "+0.300 +- 0.100" in text
    assert "+1.000 +- 0.100, so the stage is 25.0% below it" in text  # 3 against 4
    assert "tiny                     loss 3.000" in text


def test_a_stage_no_better_than_the_decoder_alone_is_told():
    (warning,) = [line for line in verdict(last_row((0.4, 0.1), None, (0.2, 0.1))) if "WARNING" in line]
    assert "no better than the decoder alone" in warning
    (warning,) = verdict(last_row(None))
    assert "WARNING: no listening test" in warning


def write_answers(path: Path, *groups: tuple[str, list[str], list[tuple[str, str, str | None]]]) -> None:
    rows = [
        {"step": 9, "mix": "sft", "corpus": corpus, "key": "k", "prompt": "?", "references": [reference, "!"],
         "output": answer, "text_only": text, "choices": choices}
        for corpus, choices, cells in groups for reference, answer, text in cells
    ]  # fmt: skip
    free = {"step": 9, "prompt": "Write.", "references": ["A dog."], "output": "A cat.", "choices": []}
    before = [row | {"step": 4, "output": "a"} for row in (*rows, free)]
    path.write_text("".join(json.dumps(r) + "\n" for r in (*before, *rows, free)))


def test_the_table_of_answers_counts_exact_matches(tmp_path):
    four = [("a", "a", "b"), ("b", "b", "b"), ("b", "a", None), ("b", "b", "a")]
    write_answers(tmp_path / "a", ("c", ["a", "b"], four), ("d", ["a", "b"], [("a", "a ", None)]))
    head, one, two, *free = answer_table(tmp_path / "a")
    assert head.split()[-4:] == ["exact", "chance", "text", "only"]
    assert one.split() == ["sft:", "c:", "a", "/", "b", "4", "75.0%", "75.0%", "33.3%"]
    assert two.split() == ["sft:", "d:", "a", "/", "b", "1", "0.0%", "100.0%", "-"]
    assert free == ["Write.", "    reference  A dog.", "    answer     A cat."]


def finished(folder: Path, first: dict, last: dict) -> Path:
    (folder / "weights").mkdir(parents=True)
    (folder / "weights/stage.json").write_text(json.dumps({"stage": "stage3_sft", "steps": 9, "seconds": 90.2}))
    rows = [{"step": 0, **first}, {"step": 5, "loss": 1.0}, {**last, "step": 9}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_the_ending_tells_steps_time_losses_and_the_verdict(tmp_path):
    also = {"pretrain": {"val_loss": 5.0}}
    first, last = last_row((0.0, 0.1)) | {"val_loss": 4.0, "also": also}, last_row((0.1, 0.1)) | {"also": also}
    folder = finished(tmp_path / "run", first, last)
    write_answers(folder / "answers.jsonl", ("c", ["a", "b"], [("a", "a", "b")]))
    lines = ending(folder)
    assert lines[0] == "stage3_sft: 9 steps in 1 min 30 s, validation loss 4.000 -> 3.000 (-25.0%)"
    assert any("DOES NOT LISTEN" in line for line in lines)
    assert any("mix pretrain: validation loss 5.000 -> 5.000" in line for line in lines)
    assert lines[-1] == "    answer     A cat."


def test_the_ending_of_a_run_that_looked_at_another_mix_only_since_its_resume(tmp_path):
    """data.also may change between a run and its resume."""
    folder = finished(
        tmp_path / "run", last_row((0.0, 0.1)), last_row((1.0, 0.1)) | {"also": {"sft": {"val_loss": 5.0}}}
    )
    assert any("mix sft" in line and "5.000" in line for line in ending(folder))
    nothing = tmp_path / "nothing"
    finished(nothing, {"loss": 1.0}, {"loss": 1.0})
    assert ending(nothing) == ["stage3_sft: 9 steps in 1 min 30 s"]


# -- whole stages ------------------------------------------------------------------------------------------------------


def told(stage: str, tiny: Tiny, runs: Path, **more: object) -> tuple[Path, str]:
    """The run folder of a stage and what it printed."""
    out = io.StringIO()
    with redirect_stdout(out):
        folder = run_stage(stage, tiny, runs, **more)
    return folder, out.getvalue()


LOOK = {"data__also": "[sft]", "data__answers": 2, "log__answers": 2}


def without_seconds(file: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(file)]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> tuple[Path, str]:
    """A stage 1 that looks at the questions too: its decoder learns."""
    return told("stage1_align", tiny, tmp_path_factory.mktemp("whole"), **LOOK)


def test_rows_of_a_stage(whole):
    rows = [r for r in read_metrics(whole[0] / "metrics.jsonl") if "val_loss" in r]
    assert [r["step"] for r in rows] == [0, 2, 4]
    assert (
        set(rows[0]) == set(rows[2]) == {"step", "val_loss", "targets", "corpora", "tasks", "languages", "also", *HEARD}
    )
    assert set(rows[1]) == {"step", "val_loss", "targets", "corpora", "tasks", "languages", "listening"}
    for row in (rows[0], rows[2]):
        assert set(row["also"]["sft"]) == {"val_loss", "targets", "corpora", "tasks", "languages"}
        assert row["listening"]["samples"] == 4
        assert set(row["corpora"]["tiny_caption"]) == {"loss_sum", "targets", *HEARD}
        alone = row["val_loss"] + row["text_only"]["difference"]
        assert alone == pytest.approx(rows[0]["val_loss"] + rows[0]["text_only"]["difference"])  # never measured again
    text_only = json.loads((whole[0] / "text_only.json").read_text())
    assert sum(name.startswith("align/tiny_caption/") for name in text_only["losses"]) == 4
    assert len(text_only["answers"]) == 4


def test_the_end_of_a_stage_is_printed(whole):
    folder, out = whole
    lines = out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("stage1_align: 4 steps in "))
    assert lines[start : start + len(ending(folder))] == ending(folder)
    assert "listening: with another clip" in out
    assert "exact match of greedy answers" in out
    rows = read_metrics(folder / "answers.jsonl")
    assert Counter(r["step"] for r in rows) == {0: 2, 2: 2, 4: 2 + 2 + 4}
    assert sum(r.get("text_only") is not None for r in rows) == 4
    assert [r["id"] for r in rows if r["step"] == 0] == [r["id"] for r in rows if r["step"] == 2]
    assert "2 of them answered in words (at most 48 tokens each)" in (folder / "trainable.txt").read_text()
    took = [r for r in read_metrics(folder / "speed.jsonl") if "validation_s" in r]
    assert [r["step"] for r in took] == [0, 2, 4]
    assert all(0 < r["answers_s"] < r["validation_s"] for r in took)
    assert "besides, 3 validations took" in out


def test_the_decoder_alone_is_measured_once_and_survives_a_resume(tiny, whole, tmp_path, monkeypatch):
    """A decoder that learns: measured again at the resume it would be another one."""
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            told("stage1_align", tiny, tmp_path, **LOOK)
    folder, out = told("stage1_align", tiny, tmp_path, **LOOK)
    assert "resuming at step 2" in out
    for file in ("text_only.json", "metrics.jsonl"):
        assert (folder / file).read_text() == (whole[0] / file).read_text(), file
    assert without_seconds(folder / "answers.jsonl") == without_seconds(whole[0] / "answers.jsonl")  # none twice


def test_the_first_try_of_a_killed_run_leaves_no_text_only_behind(tiny, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            told("stage1_align", tiny, tmp_path, **LOOK)
    folder = order_for("stage1_align", tiny, tmp_path).folder
    (folder / "text_only.json").write_text('{"losses": {}, "answers": {}}')
    told("stage1_align", tiny, tmp_path, **LOOK)
    assert (folder / "text_only.json").read_text() == (whole[0] / "text_only.json").read_text()
    assert without_seconds(folder / "answers.jsonl") == without_seconds(whole[0] / "answers.jsonl")


def test_measuring_changes_nothing_in_the_training(tiny, whole, tmp_path, monkeypatch):
    """Neither the looks nor the answers leave a trace in LoRA, its dropout or the generators."""
    modes, losses = set(), []
    training_step = StageModule.training_step

    def watched(self, batch, batch_idx):
        dropouts = [m for n, m in self.model.named_modules() if n.endswith("lora_dropout.default")]
        modes.update((m.training, m.p) for m in dropouts)
        modes.update(m.scaling["default"] for m in self.model.modules() if hasattr(m, "lora_A"))
        training_step(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", watched)
    shutil.copytree(whole[0], tmp_path / "mini/stage1_align")
    for name, more in {
        "much": LOOK | {"log__val_every": 1},
        "little": {"data__val_clips": 1, "log__val_every": 9},
    }.items():
        folder, _ = told("stage2_pretrain", tiny, tmp_path, name=name, **more)
        losses.append([r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r])
    assert losses[0] == losses[1]
    assert modes == {(True, 0.1), 4.0}  # in training, dropout acts and LoRA is scaled by alpha / rank


def forward_that(costs: Callable[[str, int | None], float]) -> Callable[[AudioLM, Pack], Tensor]:
    """AudioLM.forward with `costs(key, samples of its clip, None without)` more for each target."""
    forward = AudioLM.forward

    def rigged(self: AudioLM, pack: Pack) -> Tensor:
        loss_S = forward(self, pack)
        clips, more = list(pack.clips), torch.zeros(len(pack.segments))
        heard = [bool(part.any()) for part in pack.is_audio_T.split(pack.segments)]
        labels = pack.labels_T.split(pack.segments)
        for n, key in enumerate(pack.keys):
            more[n] = costs(key, clips.pop(0) if heard[n] else None) * float((labels[n] != NO_TARGET).sum())
        return loss_S + more

    return rigged


def test_a_stage_that_listens_passes(tiny, chat, tmp_path, monkeypatch):
    card = read_mix("align", tiny.manifests).cards[0]
    index = open_index(card, tiny.shards, chat)
    own = {r.key: r.n_samples for r in (*training_records(index), *index.held_out)}
    monkeypatch.setattr(
        AudioLM, "forward", forward_that(lambda key, clip: 0 if clip == own.get(key) else 2 if clip else 5)
    )
    folder, out = told("stage1_align", tiny, tmp_path)
    assert "WARNING" not in out
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert last["listening"]["difference"] == pytest.approx(2, abs=0.5)
    assert last["text_only"]["difference"] == pytest.approx(5, abs=1)
    assert Paired(**last["listening"]).sure
    assert Paired(**last["text_only"]).sure


@pytest.fixture
def equal_clips(tiny, tmp_path) -> Path:
    """The tiny corpus with clips of one length, so that a deaf model has nothing at all to go by."""
    members = [(f"tone{n}", flac(tone(0.5, n)), record(n)) for n in range(42)]
    write_shard(tmp_path / "shards" / "tiny-000000.tar", members)
    return tmp_path / "shards"


def test_a_stage_whose_loss_falls_though_it_does_not_listen_ends_with_a_loud_warning(
    tiny, equal_clips, tmp_path, monkeypatch
):
    encode = AudioLM.encode
    monkeypatch.setattr(AudioLM, "encode", lambda self, audio, *lengths: encode(self, 0 * audio, *lengths))
    more = {"data__root": equal_clips, "run__length": "12 steps", "data__val_clips": 8}
    folder, out = told("stage1_align", tiny, tmp_path, **more)
    first, *_, last = [r for r in read_metrics(folder / "metrics.jsonl") if "val_loss" in r]
    assert last["val_loss"] < 0.98 * first["val_loss"]
    assert last["listening"]["difference"] == pytest.approx(0, abs=1e-6)
    assert "WARNING: THIS STAGE DOES NOT LISTEN" in out


def test_lora_of_the_stage_before_is_no_part_of_the_decoder_alone(tiny, whole, tmp_path):
    """Stage 3 carries the LoRA of stage 2 on; what text alone can do is still that of the base decoder."""
    strong = {"optim__lr_for": "{'*.lora_*': 0.1}"}
    shutil.copytree(whole[0], tmp_path / "mini/stage1_align")
    two = run_stage("stage2_pretrain", tiny, tmp_path, **LOOK, **strong)
    three = run_stage("stage3_sft", tiny, tmp_path, data__mix="pretrain")  # the same questions
    of_two, of_three = (json.loads((f / "text_only.json").read_text())["losses"] for f in (two, three))
    assert len(of_three) == 8
    for name, sums in of_three.items():
        assert sums == pytest.approx(of_two[name], rel=1e-5)
    rows = [r for r in read_metrics(two / "metrics.jsonl") if "val_loss" in r]
    assert rows[0]["val_loss"] != pytest.approx(rows[-1]["val_loss"], rel=1e-3)  # the LoRA acts
