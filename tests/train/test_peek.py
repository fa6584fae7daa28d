"""A pack is shown as the model sees it, and a wrong loss mask is named."""

import base64
import io
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch

from midasheng import frames
from midasheng.config import UserError
from midasheng.data import peek as judge
from midasheng.data import plan
from midasheng.data.chat import Chat, trunk
from midasheng.data.loader import conversation, train_loader
from midasheng.data.manifest import Card, read_mix
from midasheng.data.peek import Chosen, check, choose, find, planner_before
from midasheng.data.plan import Budget
from midasheng.data.room import read_data
from midasheng.model.adapt import base_state, lora_state
from midasheng.sample import NO_TARGET, Pack, Sample, Turn, bounds, pack
from midasheng.train import checkpoint, peek
from midasheng.train.fit import build, open_starts
from midasheng.train.module import Stopped
from stages import peek as command_room
from tests.conftest import CONFIGS, Tiny, order_for, run_stage, tone
from tests.model import OMNI, tiny_lm
from tests.train.test_resume import stop_after

MARKUP = "</div><script>alert(1)</script> & <|im_end|> [x] \x1b[2J"


@pytest.fixture(scope="module")
def card(tiny_data: Tiny) -> Card:
    return read_mix("align", tiny_data.manifests).cards[0]


def made(card: Card, chat: Chat, *answers: str, slots: int = 128) -> Chosen:
    """A pack of one conversation for each answer, each with a clip, as the loader lays it."""
    samples = [
        conversation(
            card, f"tone{n}", [Turn("user", "Which language?", clips=1), Turn("assistant", answer)],
            [tone(1.0 + n, n)], chat,
        ) for n, answer in enumerate(answers)
    ]  # fmt: skip
    laid = pack(samples, slots, chat.pad, None, 120)
    planned = tuple((f"{card.name}/{key}", t) for key, t in zip(laid.keys, laid.targets, strict=True))
    return Chosen(0, 0, laid, planned, ())


def look(chosen: Chosen, chat: Chat, nats: dict[int, float] | None = None) -> peek.Look:
    shown = tuple(peek.segments(chosen.pack, chat, nats))
    verdict = tuple(check(chosen, chat))
    return peek.Look("a pack", (), chosen, Budget(128, 120, 1), shown, verdict, "weights" if nats else "")


@pytest.fixture
def chosen(card: Card, chat: Chat) -> Chosen:
    return made(card, chat, "A Spanish tone.", "yes")


# -- the verdict -------------------------------------------------------------------------------------------------------


def relabelled(chosen: Chosen, labels_T: torch.Tensor) -> Chosen:
    """The same pack with other labels, and everything that follows from labels."""
    target_N = torch.from_numpy(np.flatnonzero(labels_T.numpy() != NO_TARGET))
    until = np.cumsum([0, *chosen.pack.segments[: len(chosen.pack.keys)]])
    counts = tuple(np.diff(np.searchsorted(target_N.numpy(), until)).tolist())
    return replace(chosen, pack=replace(chosen.pack, labels_T=labels_T, target_N=target_N, targets=counts))


def wrong(chosen: Chosen, chat: Chat) -> dict[str, str]:
    return {c.name: c.found for c in check(chosen, chat) if c.found}


def test_a_good_pack_is_good(chosen, chat):
    assert wrong(chosen, chat) == {}
    assert len(check(chosen, chat)) == 10


def test_conversations_of_every_form_are_good(card, chat):
    forms = (
        [Turn("system", "Be short."), Turn("user", "a", clips=2), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "")],
        [Turn("user", "Listen:", clips=2, text_first=True), Turn("assistant", "assistant\n<|im_start|>user\n")],
    )  # fmt: skip
    samples = [conversation(card, "k", turns, [tone(0.5, 1), tone(1.0, 2)], chat) for turns in forms]
    laid = pack(samples, 160, chat.pad)
    assert wrong(Chosen(0, 0, laid, ((f"{card.name}/k", sum(laid.targets)),), ()), chat) == {}


def test_labels_that_are_not_shifted(chosen, chat):
    p = chosen.pack
    labels_T = torch.full_like(p.labels_T, NO_TARGET)
    labels_T[p.target_N + 1] = p.ids_T[p.target_N + 1]
    found = wrong(relabelled(chosen, labels_T), chat)
    assert "each slot is asked for its own token" in found[judge.SHIFTED]
    assert 'must predict "A' in found[judge.SHIFTED]
    assert judge.HEADER in found


def test_labels_that_are_shifted_twice(chosen, chat):
    p = chosen.pack
    labels_T = torch.full_like(p.labels_T, NO_TARGET)
    labels_T[p.target_N - 1] = p.ids_T[p.target_N + 1]
    assert "shifted by two" in wrong(relabelled(chosen, labels_T), chat)[judge.SHIFTED]


def test_labels_on_the_prompt(chosen, chat):
    labels_T = chosen.pack.labels_T.clone()
    at = int(chosen.pack.audio_K[-1]) + 1  # <|audio_eos|> of the second: the first word of the prompt follows
    labels_T[at] = chosen.pack.ids_T[at + 1]
    found = wrong(relabelled(chosen, labels_T), chat)
    assert found[judge.PLACE].startswith(f"slot {at} of tiny_caption/tone1 must predict ")
    assert set(found) == {judge.PLACE, judge.PLANNED}


def test_a_label_on_the_header(chosen, chat):
    labels_T = chosen.pack.labels_T.clone()
    at = int(chosen.pack.target_N[0]) - 1
    labels_T[at] = chosen.pack.ids_T[at + 1]
    assert set(wrong(relabelled(chosen, labels_T), chat)) == {judge.PLACE, judge.HEADER, judge.PLANNED}


def test_an_end_without_label(chosen, chat):
    labels_T = chosen.pack.labels_T.clone()
    labels_T[chosen.pack.target_N[-1]] = NO_TARGET
    found = wrong(relabelled(chosen, labels_T), chat)
    assert set(found) == {judge.CLOSED, judge.PLANNED}
    assert "of tiny_caption/tone1" in found[judge.CLOSED]


def test_an_answer_without_labels(chosen, chat):
    labels_T = chosen.pack.labels_T.clone()
    labels_T[chosen.pack.segments[0] : sum(chosen.pack.segments[:2])] = NO_TARGET
    assert set(wrong(relabelled(chosen, labels_T), chat)) == {judge.ALL_OF, judge.CLOSED, judge.HEADER, judge.PLANNED}


def test_an_audio_slot_with_a_label(chosen, chat):
    labels_T = chosen.pack.labels_T.clone()
    at = int(chosen.pack.audio_K[2])
    labels_T[at] = chosen.pack.ids_T[at + 1]
    found = wrong(relabelled(chosen, labels_T), chat)
    assert found[judge.NO_AUDIO] == f"slot {at} of tiny_caption/tone0 must predict <|AUDIO|>"


def test_targets_that_the_plan_does_not_know(chosen, chat):
    (key, targets), *others = chosen.planned
    found = wrong(replace(chosen, planned=((key, targets + 1), *others)), chat)
    assert found == {judge.PLANNED: f"{key}: {targets} targets, {targets + 1} planned"}


def test_audio_slots_that_are_not_the_encoders(chosen, chat):
    clips = (chosen.pack.clips[0] + 6400, chosen.pack.clips[1] - 6400)  # as many tokens in all
    found = wrong(replace(chosen, pack=replace(chosen.pack, clips=clips)), chat)
    assert set(found) == {judge.TOKENS}
    assert found[judge.TOKENS].startswith("clip 0 (1.40 s): 5 slots from slot ")


def test_targets_that_the_model_does_not_read(chosen, chat):
    p = replace(chosen.pack, target_N=chosen.pack.target_N[:-1])
    assert set(wrong(replace(chosen, pack=p), chat)) == {judge.READ}
    ids_T = chosen.pack.ids_T.clone()
    ids_T[3] = chat.audio  # its embedding would be looked up
    assert judge.READ in wrong(replace(chosen, pack=replace(chosen.pack, ids_T=ids_T)), chat)


def test_a_tail_with_a_label(chosen, chat):
    labels_T = chosen.pack.labels_T.clone()
    labels_T[-2] = chat.pad
    assert judge.FILLED in wrong(relabelled(chosen, labels_T), chat)


def shared(card: Card, chat: Chat) -> tuple[list[Sample], Chosen]:
    """Three questions about one clip, and one about another, all behind one lead."""

    def asked(key: str, question: str, seconds: float) -> Sample:
        turns = [Turn("user", question, clips=1), Turn("assistant", "yes")]
        return conversation(card, key, turns, [tone(seconds, 0)], chat)

    run = [asked("run", question, 1.0) for question in ("Is it?", "Which one?", "Really?")]
    common, alone = trunk(run), asked("alone", "Is it?", 2.0)
    samples = [run[0], *(replace(s, clips=(), common=common) for s in run[1:]), alone]
    laid = pack(samples, 128, chat.pad, None, 120, int(alone.is_audio.argmax()))
    counts = Counter({f"{card.name}/run": sum(laid.targets[:3]), f"{card.name}/alone": laid.targets[3]})
    return samples, Chosen(0, 0, laid, tuple(counts.items()), ())


def test_a_pack_that_shares_is_judged_by_whole_conversations(card, chat):
    samples, chosen = shared(card, chat)
    p = chosen.pack
    assert (wrong(chosen, chat), p.shared) == ({}, 2)
    for number, sample in enumerate(samples):
        slots = judge.path(p, number)
        assert p.ids_T[slots].tolist() == sample.ids.tolist()
        assert p.position_T[slots].tolist() == list(range(len(slots)))
    own = [f"{card.name}/{s.key}" for s in samples]
    assert [judge.name(p, n) for n in range(7)] == [*own, *["shared, computed once"] * 2, "dummy tail"]
    shown = peek.segments(p, chat, None)
    assert [s.clips for s in shown] == [(), (), (), (1,), (0,), (), ()]
    assert sum(s.audio_slots for s in shown) == 5 + 10


def test_a_pack_that_shares_with_a_wrong_mask_or_clip(card, chat):
    _, chosen = shared(card, chat)
    p = chosen.pack
    starts = p.segment_bounds.tolist()
    for slot, name in ((starts[5] - 1, judge.FILLED), (starts[5], judge.FILLED), (starts[1], judge.PLACE)):
        labels_T = p.labels_T.clone()  # on the trunk's last slot, in the lead, on a question
        labels_T[slot] = p.ids_T[slot + 1]
        assert name in wrong(relabelled(chosen, labels_T), chat)
    by_slot = replace(p, audio_K=p.audio_K.sort().values)  # the clip of the run would be heard by the other one
    assert set(wrong(replace(chosen, pack=by_slot), chat)) == {judge.TOKENS}


def test_packs_of_a_stage_that_shares_are_good(tiny_data, tmp_path):
    stage = order_for("stage3_sft", tiny_data, tmp_path, batch__share="true").stage
    data = read_data(stage, make=True)
    chosen = [choose(data, planner_before(data, 0, 0), n) for n in range(data.budget.packs_per_step)]
    assert [wrong(c, data.chat) for c in chosen] == [{}] * len(chosen)
    assert all(c.pack.shared for c in chosen)


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_text_of_a_known_pack(card, chat):
    said = peek.text(look(made(card, chat, "yes", slots=40), chat), colour=False, width=60)
    slots = len(chat.encode([Turn("user", "Which language?", clips=1), Turn("assistant", "yes")], [5]).ids)
    end = chat.spell(chat.im_end)
    assert f"0  tiny_caption/tone0  caption  slots 0..{slots - 1} ({slots}): 5 audio slots, " in said
    assert "heard: 1.00 s" in said
    assert (
        "    <|im_start|>user\\n\n    <|audio_bos|><|AUDIO|> x 5<|audio_eos|>Which language?<|im_end|>\\n\n"
        "    <|im_start|>assistant\\n\n    [yes][<|im_end|>]\n"
    ) in said
    first, *_, last = (int(t) for t in chat.encode([Turn("assistant", "yes")], []).labels if t != NO_TARGET)
    assert re.search(rf'  {slots - 2 - said.count(" -> ") + 1} "\\n" -> {re.escape(judge.quoted(chat, first))}', said)
    assert re.search(rf'  {slots - 2} "[^"]+" -> {re.escape(end)}', said)
    assert last == chat.im_end
    assert f"1  dummy tail  slots {slots}..39 ({40 - slots}): 0 targets" in said
    assert f"fill: {slots} of 40 slots ({slots / 40:.1%}), 25 of 120 frames (20.8%)" in said
    assert "5 audio tokens, 1 clips of 1.00 s" in said
    assert said.endswith("all 10 checks hold")


def test_an_off_by_one_is_seen_in_the_text(chosen, chat):
    p = chosen.pack
    labels_T = torch.full_like(p.labels_T, NO_TARGET)
    labels_T[p.target_N + 1] = p.ids_T[p.target_N + 1]
    said = peek.text(look(relabelled(chosen, labels_T), chat), colour=False, width=100)
    assert f"{p.segments[0] - 1} <|im_end|> -> <|im_end|>" in said
    assert "(asked: <|im_end|>)]" in said
    assert "WRONG  labels are shifted by exactly one" in said


def test_colour_takes_the_place_of_brackets(chosen, chat):
    said = peek.text(look(chosen, chat), colour=True, width=100)
    assert f"{peek.GREEN}yes{peek.PLAIN}{peek.GREEN}<|im_end|>{peek.PLAIN}" in said
    assert re.sub(r"\x1b\[[\d;]*m", "", said).replace("what is green", "what is [in brackets]") == peek.text(
        look(chosen, chat), colour=False, width=100
    ).replace("[yes][<|im_end|>]", "yes<|im_end|>").replace(
        "[A Spanish tone.][<|im_end|>]", "A Spanish tone.<|im_end|>"
    )


def test_words_that_a_terminal_would_obey(card, chat):
    """Nor does a transcript look like the end of a turn, or like a mark."""
    said = peek.text(look(made(card, chat, MARKUP), chat), colour=False, width=100)
    assert "\x1b" not in said
    assert "<\\|im_end|> \\[x\\] \\x1b\\[2J][<|im_end|>]" in said


def test_a_page_holds_the_words_and_the_clips(card, chat):
    chosen = made(card, chat, MARKUP, "nothing \ufffd")
    html = peek.page(look(chosen, chat))
    assert "<script" not in html
    assert "&lt;/div&gt;&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;\\|im_end|&gt; [x] \\x1b[2J</mark>" in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert html.count("<audio ") == len(chosen.pack.clips) == 2
    clips = re.findall(r'src="data:audio/flac;base64,([^"]+)"', html)
    for number, (clip, n_samples) in enumerate(zip(clips, chosen.pack.clips, strict=True)):
        wave, rate = soundfile.read(io.BytesIO(base64.b64decode(clip)), dtype="float32")
        assert (rate, wave.shape) == (frames.SAMPLE_RATE, (n_samples,))
        assert np.abs(wave - tone(1.0 + number, number)).max() < 1e-4


# -- losses ------------------------------------------------------------------------------------------------------------


def test_losses_of_targets_sum_to_the_models(chosen, chat):
    lm = tiny_lm(OMNI, vocab_size=512).eval()
    nats = peek.losses(lm, chosen.pack)
    assert list(nats) == chosen.pack.target_N.tolist()
    with torch.no_grad():
        loss_S = lm(chosen.pack)
    starts = bounds(chosen.pack.segments).tolist()
    for number, (a, b) in enumerate(pairwise(starts)):
        assert sum(v for s, v in nats.items() if a <= s < b) == pytest.approx(float(loss_S[number]), rel=1e-5)
    shown = look(chosen, chat, nats)
    said, first = peek.text(shown, colour=False, width=100), shown.segments[0]
    mean = float(loss_S[0]) / len(first.targets)
    assert f"loss {mean:.3f} nats a target ({float(loss_S[0]):.3f} in all)" in said
    assert (
        f"{first.targets[0].slot} {first.targets[0].holds} -> {first.targets[0].asked} {first.targets[0].loss:.3f}"
        in said
    )


def test_weights_are_the_runs(tiny, tmp_path, monkeypatch):
    """Of a stopped run those of its checkpoint, of a finished one its weights/, LoRA with them."""
    run_stage("stage1_align", tiny, tmp_path, run__length="2 steps")
    more = {"run__length": "3 steps", "optim__lr": 0.01}
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(Stopped):
            run_stage("stage2_pretrain", tiny, tmp_path, **more)
    order = order_for("stage2_pretrain", tiny, tmp_path, **more)
    data = read_data(order.stage, make=False)
    assert peek.model_of_run(order.stage, tmp_path / "mini" / "none", data.chat) is None
    stopped = peek.model_of_run(order.stage, order.folder, data.chat)
    assert stopped is not None
    assert stopped[1].endswith("last.ckpt, step 1")
    run_stage("stage2_pretrain", tiny, tmp_path, **more)
    finished = peek.model_of_run(order.stage, order.folder, data.chat)
    assert finished is not None
    assert finished[1] == str(order.folder / "weights")
    assert not finished[0].training
    saved = checkpoint.read(order.folder / "checkpoints" / "last.ckpt")["learned"]
    now, before = finished[0].state_dict(), stopped[0].state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[n], saved.get(n, before[n])) for n in now)
    start = build(order, open_starts(order))[0]
    for state in (base_state, lora_state):
        names = state(finished[0])
        assert any(not torch.equal(names[n], state(stopped[0])[n]) for n in names)
        assert any(not torch.equal(state(stopped[0])[n], state(start)[n]) for n in names)
    assert before.keys() == now.keys()


# -- choosing ----------------------------------------------------------------------------------------------------------


def same_pack(one: Pack, other: Pack) -> bool:
    tensors = [k for k, v in vars(one).items() if isinstance(v, torch.Tensor)]
    return one.keys == other.keys and all(torch.equal(getattr(one, k), getattr(other, k)) for k in tensors)


def test_the_pack_is_the_one_that_is_trained_on(tiny_data, tmp_path):
    stage = order_for("stage1_align", tiny_data, tmp_path).stage
    data = read_data(stage, make=True)
    loader = train_loader(data.planner(0), data.corpora, data.chat, 4, rank=0, world=1, workers=0)
    for step, batch in enumerate(loader):
        for number, trained in enumerate(batch.packs):
            chosen = choose(data, planner_before(data, 0, step), number)
            assert (chosen.step, chosen.number) == (step, number)
            assert same_pack(chosen.pack, trained)
            assert wrong(chosen, data.chat) == {}
    key = f"{trained.corpora[0]}/{trained.keys[0]}"
    step, number = find(data, planner_before(data, 0, 3), key)
    assert step == 3
    assert trained.keys[0] in choose(data, planner_before(data, 0, step), number).pack.keys
    with pytest.raises(UserError, match="no training record has this key"):
        find(data, planner_before(data, 0, 0), "tiny_caption/nothing")
    with pytest.raises(UserError, match="STEP=4: the run has steps 0 to 3"):
        planner_before(data, 0, 4)
    with pytest.raises(UserError, match="PACK=2: a step has packs 0 to 1"):
        choose(data, planner_before(data, 0, 0), 2)


def test_a_step_of_a_run_whose_mix_changed(tiny_data, tmp_path, monkeypatch):
    """Also before the first saved state, and between two, the first of which knew nothing of the change."""
    monkeypatch.setattr(plan, "BLOCK", 8)  # samples that are drawn together, in the mix of their step
    monkeypatch.setattr(plan, "WINDOW", 8)
    stage = order_for("stage2_pretrain", tiny_data, tmp_path, run__length="24 steps").stage
    data = read_data(stage, make=True)
    (tmp_path / "ledger").mkdir()
    changes = {1: (0.0, 100.0), 13: (100.0, 0.0)}
    planner, unchanged, planned, states = data.planner(0), data.planner(0), [], []
    for step in range(24):
        if step and step % 9 == 0:
            states.append(json.dumps({"step": step - 1, "plan": planner.state()}) + "\n")
        if step in changes:
            planner.change(step + 1, changes[step])
        planned.append(next(planner).packs)
    states.append(json.dumps({"step": 23, "plan": planner.state()}) + "\n")
    (tmp_path / "ledger" / "states.jsonl").write_text("".join(states))
    for step in range(24):
        assert next(planner_before(data, 0, step, tmp_path)).packs == planned[step], step
    assert [next(unchanged).packs == packs for packs in planned[:9]][-1] is False
    unchanged.restore(json.loads(states[0])["plan"])
    assert [next(unchanged).packs == packs for packs in planned[9:18]][-1] is False


# -- the command -------------------------------------------------------------------------------------------------------


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["peek", *map(str, arguments)])
    status = command_room.main()
    return status, *capsys.readouterr()


def test_the_command(tiny_data, tmp_path, monkeypatch, capsys):
    settings = ["--runs", tmp_path, "--config", CONFIGS / "stage3_sft.yaml", *tiny_data.settings(run__length="4 steps")]
    to = tmp_path / "pack.html"
    status, plain, _ = command(monkeypatch, capsys, *settings, "--step", 2, "--pack", 1, "--to", to)
    assert (status, plain.splitlines()[0]) == (0, "stage3_sft at mini, mix sft: step 2 of 4, pack 1 of 2")
    assert "all 10 checks hold" in plain
    assert "\x1b" not in plain
    assert "<title>stage3_sft at mini, mix sft: step 2 of 4, pack 1 of 2</title>" in to.read_text()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in command(monkeypatch, capsys, *settings)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in command(monkeypatch, capsys, *settings)[1]
    key = re.search(r"^0  (\S+)", plain, flags=re.M)
    assert key
    found = command(monkeypatch, capsys, *settings, "--step", 2, "--key", key[1])[1]
    assert re.search(rf"^\d+  {re.escape(key[1])}  ", found, flags=re.M)
    assert "step 2 of 4" in found
    for wrong_order, said in (
        (["--name", "none"], "no run"), (["--name", "none", "data.val_clips=1"], "NAME= looks at a run"),
        ([*settings, "--pack", 9], "PACK=9"), ([*settings, "--to", tmp_path / "no" / "x.html"], "cannot be written"),
    ):  # fmt: skip
        status, _, error = command(monkeypatch, capsys, "--runs", tmp_path, *wrong_order)
        assert (status, said in error) == (2, True), error


def test_the_command_ends_with_1_when_a_mask_is_wrong(tiny_data, tmp_path, monkeypatch, capsys):
    """The bug is in the code that makes the labels; the verdict does not take its word."""
    encode = Chat.encode

    def unshifted(self, *arguments, **more):
        made = encode(self, *arguments, **more)
        return replace(made, labels=np.concatenate([[NO_TARGET], made.labels[:-1]]))

    monkeypatch.setattr(Chat, "encode", unshifted)
    settings = [
        "--runs",
        tmp_path,
        "--config",
        CONFIGS / "stage1_align.yaml",
        *tiny_data.settings(run__length="4 steps"),
    ]
    status, said, _ = command(monkeypatch, capsys, *settings)
    assert status == 1
    assert "WRONG  labels are shifted by exactly one" in said
    assert "no label is shifted" in said
