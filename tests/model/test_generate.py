"""Decoding with a cache gives what the training forward gives, for every answer of a batch as if it were alone."""

import dataclasses

import numpy as np
import pytest
import torch

from midasheng import frames
from midasheng.config import UserError
from midasheng.model import adapt, encoder, generate
from midasheng.model.audio_lm import AudioLM
from midasheng.model.generate import Continuation, Decoding, Sampling, choose
from midasheng.sample import Pack, Sample, pack
from tests.model import LLAMA, OMNI, PAD, QWEN3, VOCAB, conversation, noise, packed, tiny_lm

ALL = pytest.mark.parametrize("architecture", [OMNI, QWEN3, LLAMA])


def prompt(*clips: int, seed: int = 3) -> Sample:
    return conversation(seed, *clips, answer=1)


def prompts(*samples: Sample) -> Pack:
    """Prompts end to end, without a tail."""
    return pack(list(samples), sum(len(s.ids) for s in samples), PAD)


def eight() -> list[Sample]:
    clips = [(16_000,), (), (3_200,), (5_000, 9_000), (640 * 505,), (40_000,), (), (7_777, 3_200, 12_345)]
    return [prompt(*lengths, seed=number) for number, lengths in enumerate(clips)]


def with_lora(lm: AudioLM) -> AudioLM:
    """LoRA on all linear layers that has learned something."""
    adapt.freeze_all_but(lm, ["audio_projector.*"])
    adapt.add_lora(lm, adapt.LoraPlan(("all-linear",), 2, 8.0, 0.1), seed=1)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return lm


def merged(adapted: AudioLM, architecture: str) -> AudioLM:
    """The same LoRA in the weights of a model without."""
    lm, state, lora = tiny_lm(architecture), adapt.base_state(adapted), adapt.lora_state(adapted)
    for name, tensor in state.items():
        a = lora.get(name.removesuffix("weight") + "lora_A.weight")
        if a is not None:
            state[name] = tensor + 4.0 * lora[name.removesuffix("weight") + "lora_B.weight"] @ a
    lm.load_state_dict(state)
    return lm


@torch.no_grad()
def cacheless(lm: AudioLM, sample: Sample, answer: tuple[int, ...]) -> torch.Tensor:
    """Logits of the training forward (answer + 1, V): what comes after the prompt, and after each id of the answer."""
    ids = np.concatenate([sample.ids, np.array(answer, dtype=np.int64)])
    more = np.zeros(len(answer), dtype=bool)
    whole = dataclasses.replace(sample, ids=ids, labels=ids, is_audio=np.concatenate([sample.is_audio, more]))
    return lm.decoder.logits(lm.hidden(packed(whole))).float()[len(sample.ids) - 1 :]


def cached(lm: AudioLM, row: Pack, forced: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """The same of a whole pack through the cache, the answers forced; rows leave as their answers end."""
    decoding = Decoding(lm, row)
    found: list[list[torch.Tensor]] = [[] for _ in forced]
    for number in range(max(map(len, forced)) + 1):
        for place, one in zip(decoding.rows, decoding.logits_RV, strict=True):
            found[place].append(one)
        if going := {r: forced[r][number] for r in decoding.rows if len(forced[r]) > number}:
            decoding.append(going)
    return [torch.stack(rows) for rows in found]


FORMS = pytest.mark.parametrize("form", ["plain", "lora", "merged"])


def lm_of(architecture: str, form: str) -> AudioLM:
    if form == "plain":
        return tiny_lm(architecture).eval()
    adapted = with_lora(tiny_lm(architecture)).eval()
    return merged(adapted, architecture).eval() if form == "merged" else adapted


def answers_of(*lengths: int) -> list[tuple[int, ...]]:
    return [tuple(np.random.default_rng(n).integers(4, VOCAB, length).tolist()) for n, length in enumerate(lengths)]


@ALL
@FORMS
def test_cached_logits_are_those_of_the_training_forward(architecture, form, monkeypatch):
    """Of ragged prompts and answers, while some leave and stretches of the cache are moved."""
    monkeypatch.setattr(generate, "ROOM", 2)
    lm = lm_of(architecture, form)
    forced = answers_of(9, 3, 0, 12, 1, 7, 5, 2)
    for sample, answer, ours in zip(eight(), forced, cached(lm, prompts(*eight()), forced), strict=True):
        wanted = cacheless(lm, sample, answer)
        assert ours.shape == wanted.shape == (len(answer) + 1, VOCAB)
        assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_lora_attached_is_lora_merged():
    forced = answers_of(5, 5)
    attached, into = (cached(lm_of(OMNI, form), prompts(*eight()[:2]), forced) for form in ("lora", "merged"))
    plain = cached(lm_of(OMNI, "plain"), prompts(*eight()[:2]), forced)
    for a, b, base in zip(attached, into, plain, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
        assert (a - base).abs().max() > 0.1


@ALL
@pytest.mark.parametrize("lora", [False, True])
def test_half_precision_ranks_as_the_training_forward_does(architecture, lora):
    """Where the best logit leads by more than rounding to bf16 can make."""
    lm = tiny_lm(architecture)
    with_lora(lm) if lora else adapt.freeze_all_but(lm, ["audio_projector.*"])
    adapt.set_precision(lm.eval(), "bf16")
    forced, clear = answers_of(9, 3, 0, 12, 1, 7, 5, 2), 0
    for sample, answer, ours in zip(eight(), forced, cached(lm, prompts(*eight()), forced), strict=True):
        wanted = cacheless(lm, sample, answer)
        best = wanted.topk(2).values
        sure = best[:, 0] - best[:, 1] > 0.04 * wanted.abs().max()
        assert (ours - wanted).abs().max() < 0.04 * wanted.abs().max()
        assert torch.equal(ours.argmax(1)[sure], wanted.argmax(1)[sure])
        clear += int(sure.sum())
    assert clear > 20


def best_of(lm: AudioLM, sample: Sample, limit: int) -> tuple[int, ...]:
    """Greedy, without a cache."""
    answer: tuple[int, ...] = ()
    for _ in range(limit):
        answer += (int(cacheless(lm, sample, answer)[-1].argmax()),)
    return answer


@ALL
def test_a_batch_of_eight_answers_as_one_by_one(architecture):
    """Token for token, as long as the two best logits differ by more than 1e-3."""
    lm = tiny_lm(architecture).train()
    together = generate.generate(lm, prompts(*eight()), [], 12)
    assert lm.training  # left as it was found
    assert len({c.ids for c in together}) == 8
    compared = 0
    for sample, ours in zip(eight(), together, strict=True):
        alone = best_of(lm.eval(), sample, 12)
        margins = cacheless(lm, sample, alone)[:-1].topk(2).values
        sure = (margins[:, 0] - margins[:, 1] > 1e-3).tolist()
        until = sure.index(False) if False in sure else 12
        assert ours.ids[:until] == alone[:until]
        assert (ours.finish, len(ours.ids)) == ("length", 12)
        compared += until
    assert compared > 80


def test_an_answer_ends_at_any_of_the_stops_and_the_others_go_on():
    lm = tiny_lm().eval()
    free = [c.ids for c in generate.generate(lm, prompts(*eight()), [], 12)]
    stops = [free[1][2], free[5][4]]
    ended = generate.generate(lm, prompts(*eight()), stops, 12)
    assert {c.finish for c in ended} == {"stop", "length"}
    for whole, ours in zip(free, ended, strict=True):
        at = next((n for n, one in enumerate(whole) if one in stops), None)
        assert ours.ids == whole[:at]
        assert ours.finish == ("length" if at is None else "stop")
    assert max(c.seconds for c in ended if c.finish == "stop") <= max(c.seconds for c in ended)


def test_each_step_computes_one_slot_for_each_answer_that_goes_on(monkeypatch):
    lm = tiny_lm().eval()
    seen = []
    extend = lm.decoder.extend

    def counted(embeds_TD, *rest):
        seen.append(len(embeds_TD))
        return extend(embeds_TD, *rest)

    monkeypatch.setattr(lm.decoder, "extend", counted)
    free = [c.ids for c in generate.generate(lm, prompts(*eight()), [], 6)]
    assert seen == [sum(len(s.ids) for s in eight()), *[8] * 5]  # the last id is never read
    seen.clear()
    stop = free[1][2]
    generate.generate(lm, prompts(*eight()), [stop], 6)
    assert seen[1:] == [n for step in range(5) if (n := sum(stop not in ids[: step + 1] for ids in free))]
    assert len(set(seen[1:])) > 1


def test_compiled_blocks_are_not_compiled_anew_for_every_step():
    """They are compiled for the one shape of training; an answer has another one at every step."""
    lm = tiny_lm().eval()
    lm.compile_blocks("eager")
    torch._dynamo.utils.counters.clear()
    generate.generate(lm, prompts(*eight()), [], 3)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


# -- hearing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [5, 10])
def test_audio_in_pieces_is_audio_in_one(chunks, monkeypatch):
    """Pieces of whole chunks that audio tokens do not cross; short clips share one."""
    lm = tiny_lm().eval()
    clips = [640 * 252 * 13 + 12_345, 3_200, 16_000, 640 * 252 * 5]
    audio_L = torch.from_numpy(np.concatenate([noise(n, n) for n in clips]))
    with torch.no_grad():
        wanted = lm.encode(audio_L, clips)
        seen = []
        encode = lm.audio_encoder.encode
        monkeypatch.setattr(lm.audio_encoder, "encode", lambda mel, s: seen.append(sum(s)) or encode(mel, s))
        monkeypatch.setattr(generate, "PIECE", chunks * frames.CHUNK)
        found = generate.audio_tokens(lm, audio_L, clips)
    assert max(seen) <= chunks * frames.CHUNK
    assert sum(seen) == sum(frames.frames(n) for n in clips)
    assert len(seen) < 8
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_mel_of_a_long_clip_is_made_in_pieces_of_which_each_knows_the_loudest(monkeypatch):
    quiet_then_loud = torch.from_numpy(np.concatenate([noise(40_000, 1, 1e-7), noise(8_007, 2, 1.0)]))
    whole = encoder.LogMel()(quiet_then_loud)
    monkeypatch.setattr(encoder, "PIECE", 37)
    assert (encoder.LogMel()(quiet_then_loud) - whole).abs().max() < 1e-4
    spectrum = torch.stft(
        quiet_then_loud, 512, 160, window=torch.hann_window(512), center=True, pad_mode="reflect", return_complex=True
    )
    assert spectrum.shape[1] == whole.shape[1]


# -- choosing ---------------------------------------------------------------------------------------------------------


def drawn(logits: list[float], sampling: Sampling, times: int = 4_000) -> np.ndarray:
    """Shares of each id over many samples."""
    rows = torch.tensor([logits]).expand(times, -1)
    found = choose(rows, sampling, [f"key{n}" for n in range(times)], 0)
    return np.bincount(found, minlength=len(logits)) / times


SHARES = [0.05, 0.4, 0.25, 0.3]


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(1.0), SHARES),
        (Sampling(0.5), [0.0025, 0.16, 0.0625, 0.09]),
        (Sampling(1.0, top_k=2), [0, 0.4, 0, 0.3]),
        (Sampling(1.0, top_k=9), SHARES),
        (Sampling(1.0, top_p=0.65), [0, 0.4, 0, 0.3]),
        (Sampling(1.0, top_p=0.75), [0, 0.4, 0.25, 0.3]),
        (Sampling(1.0, top_p=0.01), [0, 1, 0, 0]),
        (Sampling(1.0, top_p=0.5, top_k=3), [0, 0.4, 0, 0.3]),  # of the three best, renormalised: .42 .32 .26
        (Sampling(), [0, 1, 0, 0]),
        (Sampling(1e-4), [0, 1, 0, 0]),
    ],
)
def test_ids_are_drawn_with_their_probability(sampling, wanted):
    wanted = np.array(wanted) / np.sum(wanted)
    found = drawn(np.log(SHARES).tolist(), sampling)
    assert np.abs(found - wanted).max() < 0.03
    assert not found[wanted == 0].any()


def test_each_step_draws_anew():
    found = [choose(torch.tensor([SHARES]).log(), Sampling(1.0), ["key"], step)[0] for step in range(2_000)]
    assert np.abs(np.bincount(found) / 2_000 - SHARES).max() < 0.04


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: write 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0: write a share"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1: write how many"),
    ],
)
def test_sampling_without_meaning_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(**values)


def test_a_sampled_answer_hangs_on_seed_and_prompt_and_not_on_its_neighbours():
    lm = tiny_lm().eval()

    def asked(*samples: Sample, seed: int = 0) -> list[Continuation]:
        return generate.generate(lm, prompts(*samples), [], 10, Sampling(1.5, 0.95, 40, seed))

    together = [c.ids for c in asked(*eight())]
    assert [asked(sample)[0].ids for sample in eight()] == together
    assert [c.ids for c in asked(*reversed(eight()))] == together[::-1]
    assert [c.ids for c in asked(*eight(), seed=1)] != together
    twin = dataclasses.replace(eight()[0], key="another")
    assert asked(twin)[0].ids != together[0]
