"""The generated corpus says what is heard: facts are measured again from the samples."""

import re
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from midasheng.curate import generated
from midasheng.curate.generated import CLOSED_WORDS, LENGTHS, LEVELS, PITCHES, SOUNDS, TEMPOS, clips
from midasheng.curate.shards import split_of
from midasheng.data.manifest import conversations, read_mix
from midasheng.sample import unit_hash

MANIFESTS = Path(__file__).parents[2] / "data_manifests/generated"
RATE = 16_000


@pytest.fixture(scope="module")
def made():
    return list(clips())


def of_stem(made, stem):
    found = [clip for clip in made if clip.stem == stem]
    assert len(found) > 400
    return found


def answers(clip):
    return {asked["question"]: asked["answer"] for asked in clip.record["questions"]}


def bpm_of(clip):
    return int(re.search(r"\d+", clip.record["source"])[0])


def stretches(samples, least_s, merge_s, level=0.2):
    """(start, end) in samples where the RMS of 5 ms is above `level` of its maximum."""
    frame = RATE // 200
    power = (samples[: len(samples) // frame * frame].astype(float).reshape(-1, frame) ** 2).mean(axis=1)
    active = np.flatnonzero(np.sqrt(power) > level * np.sqrt(power.max()))
    parts = np.split(active, np.flatnonzero(np.diff(active) > merge_s * 200) + 1)
    return [(p[0] * frame, (p[-1] + 1) * frame) for p in parts if len(p) >= least_s * 200]


def centroid(samples):
    """Mean frequency of the power spectrum in Hz."""
    power = np.abs(np.fft.rfft(samples * np.hanning(len(samples)))) ** 2
    return (power * np.fft.rfftfreq(len(samples), 1 / RATE)).sum() / power.sum()


def test_equal_bytes_on_every_run(made):
    for again, clip in zip(islice(clips(), 60), made, strict=False):
        assert (again.stem, again.key, again.record) == (clip.stem, clip.key, clip.record)
        assert again.samples.tobytes() == clip.samples.tobytes()


def test_keys_sizes_and_levels(made):
    keys = [clip.key for clip in made]
    assert len(set(keys)) == len(keys) == len(generated.plan())
    assert all(re.fullmatch(r"[a-z0-9_-]+", key) for key in keys)
    assert 45 < sum(clip.record["duration_s"] for clip in made) / 60 < 60
    assert len({clip.samples.tobytes() for clip in made}) == len(made)
    for clip in made:
        peak = np.abs(clip.samples.astype(int)).max() / 32_767
        low, high = LEVELS[clip.record["level"]]
        assert clip.samples.dtype == np.int16
        assert 0.7 <= clip.record["duration_s"] == round(len(clip.samples) / RATE, 4) <= 3.5
        assert low - 0.001 <= peak <= high + 0.001
        assert abs(clip.samples.mean()) < 0.05 * peak * 32_767
        assert answers(clip)["Is it loud or quiet?"] == clip.record["level"]


def test_tones_heard_are_the_tones_written(made):
    for clip in of_stem(made, "generated-tones"):
        heard = []
        for start, end in stretches(clip.samples, least_s=0.1, merge_s=0.02):
            spectrum = np.abs(np.fft.rfft(clip.samples[start:end], RATE))
            pitch = int(spectrum.argmax())  # in Hz: the transform is one second long
            heard += [name for name, (low, high) in PITCHES.items() if low - 10 <= pitch <= high + 10]
        assert " ".join(heard) == clip.record["text"], clip.key
        asked = answers(clip)
        assert asked["How many tones are played?"] == {2: "two", 3: "three", 4: "four", 5: "five"}[len(heard)]
        assert asked["Is the first tone low, middle or high?"] == heard[0]
        assert asked["Is the last tone low, middle or high?"] == heard[-1]
        order = list(PITCHES).index(heard[-1]) - list(PITCHES).index(heard[0])
        expected = {-1: "no", 0: None, 1: "yes"}[int(np.sign(order))]
        assert asked.get("Does the last tone lie above the first? Answer yes or no.") == expected


def test_rhythms_have_the_tempo_written(made):
    for clip in of_stem(made, "generated-beats"):
        starts = [start for start, _ in stretches(clip.samples, least_s=0, merge_s=0.15)]
        assert len(starts) >= 3, clip.key
        bpm = 60 * RATE / np.median(np.diff(starts))
        assert [name for name, r in TEMPOS.items() if r[0] - 4 < bpm < r[-1] + 5] == [clip.record["tempo"]], clip.key
        assert abs(bpm - bpm_of(clip)) < 5


def test_sounds_are_what_they_are_called(made):
    by_sound = defaultdict(list)
    for clip in of_stem(made, "generated-sounds"):
        by_sound[clip.record["sound"]].append(clip.samples.astype(float))
        low, high = LENGTHS[answers(clip)["Is the sound short or long?"]]
        assert low - 0.001 <= clip.record["duration_s"] <= high + 0.001
    assert {sound: len(found) for sound, found in by_sound.items()} == dict.fromkeys(SOUNDS, 50)

    def moves(samples):
        third = len(samples) // 3
        return centroid(samples[-third:]) / centroid(samples[:third])

    def wobble(samples):  # how far the level of 20 ms falls in the middle of the clip
        middle = samples[len(samples) // 5 : -len(samples) // 5]
        level = np.sqrt((middle[: len(middle) // 320 * 320].reshape(-1, 320) ** 2).mean(axis=1))
        return level.min() / level.max()

    def share_at_peak(samples):  # of the power within 5 % of the strongest frequency
        power = np.abs(np.fft.rfft(samples)) ** 2
        peak = int(power.argmax())
        return power[int(peak * 0.95) : int(peak * 1.05) + 1].sum() / power.sum()

    assert min(map(moves, by_sound["rising"])) > 1.3
    assert max(map(moves, by_sound["falling"])) < 0.75
    assert min(map(centroid, by_sound["hiss"])) > 3_000 > 600 > max(map(centroid, by_sound["rumble"]))
    assert min(map(wobble, by_sound["sine"])) > 0.8 > 0.35 > max(map(wobble, by_sound["tremolo"]))
    assert min(map(share_at_peak, by_sound["sine"])) > 0.98 > max(map(share_at_peak, by_sound["square"]))
    assert min(map(share_at_peak, by_sound["square"])) > 0.75 > max(map(share_at_peak, by_sound["sawtooth"]))
    assert all(len(stretches(s, 0, 0.02, level=0.3)) >= 5 for s in by_sound["clicks"])
    for samples in by_sound["bell"]:  # struck once, then dying away
        first, *_, last = (np.abs(part).max() for part in np.array_split(samples, 4))
        assert last < 0.6 * first


def test_questions_cannot_be_answered_without_listening(made):
    given = defaultdict(Counter)
    for clip in made:
        for question, answer in answers(clip).items():
            given[question][answer] += 1
    assert sum("yes or no" in question for question in given) == 1 + 3 + len(SOUNDS) + len(TEMPOS)
    for question, counts in given.items():
        if "yes or no" in question:
            assert set(counts) == {"yes", "no"}
            assert 0.45 < counts["yes"] / counts.total() < 0.55, question
        elif question != "How many tones are played?":
            assert max(counts.values()) < 1.3 * counts.total() / len(counts), question


def test_near_identical_clips_share_a_source_and_every_split_has_enough(made):
    things, sizes = defaultdict(set), defaultdict(Counter)
    for clip in made:
        source = clip.record["source"]
        validation = unit_hash("held_out:" + source) < 0.08
        sizes["test" if split_of(source) == "test" else "validation" if validation else "train"][clip.stem] += 1
        if clip.stem == "generated-beats":
            thing = f"{answers(clip)['Is the rhythm made of clicks, beeps or bursts?']} {bpm_of(clip)}"
        else:
            thing = re.sub(r"_\d+$", "", clip.key)  # all but the number of the take
        things[thing].add(source)
    assert all(len(sources) == 1 for sources in things.values()), "takes of one thing could come apart"
    assert len(set().union(*things.values())) == len(things)
    assert sum(len(of_stem) for of_stem in sizes.values()) == 9
    assert min(n for of_stem in sizes.values() for n in of_stem.values()) >= 15
    assert sizes["train"].total() > 0.8 * len(made)


def test_closed_words_are_the_answers_and_stand_in_no_longer_word(made):
    texts, given = set(), set()
    for clip in made:
        record = clip.record
        assert len(set(record["captions"])) == 3
        texts |= {record["heard"], *record["captions"], *answers(clip)}
        given |= set(answers(clip).values())
        fact = record.get("text") or record.get("sound") or record["tempo"]
        assert fact in record["heard"]
        assert record["level"] in record["heard"]
        assert all(record["level"] in caption.lower() for caption in record["captions"])
    assert given == set(CLOSED_WORDS)
    assert len(given) == len(CLOSED_WORDS)
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    cut = {word for word in words - set(CLOSED_WORDS) if any(closed in word for closed in CLOSED_WORDS)}
    assert not cut


def test_cards_fit_the_records(made):
    cards = {}
    for name in ("text", "align", "align_transcripts", "pretrain", "sft"):
        mix = read_mix(name, MANIFESTS)
        assert mix.notes == ()
        cards |= {card.name: card for card in mix.cards}
    assert len(cards) == 5
    for card in cards.values():
        stem = card.shards.removesuffix("-train-*.tar")
        fitting = [clip for clip in made if stem in ("generated-*", clip.stem)]
        assert fitting
        assert abs(card.hours - sum(clip.record["duration_s"] for clip in fitting) / 3_600) < 0.1
        assert card.context == "{heard}"
        for clip in fitting:
            assert card.held_out.by in clip.record
            assert conversations(card, clip.record, clip.key)
