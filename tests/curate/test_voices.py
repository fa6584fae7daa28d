"""Other voices: asked about, never trained on, and compared through the same telephone."""

import numpy as np
import pytest

from midasheng.config import UserError
from midasheng.curate import voices
from midasheng.curate.shards import Clip, split_of
from midasheng.data.manifest import read_card
from stages.data import CARDS
from tests.curate import tone


def write_package(folder, language, prompts):
    """A package as unpacked: `prompts` by name as int16 samples."""
    for name, samples in prompts.items():
        path = folder / "usr/share/asterisk/sounds" / language / f"{name}.gsm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(voices.to_phone(samples))
    doc = folder / "usr/share/doc/asterisk-prompt-es-co"
    doc.mkdir(parents=True)
    (doc / "copyright").write_text("GPL by Somebody\n")


def test_other_voices_are_test_clips_with_their_language(tmp_path, monkeypatch):
    monkeypatch.setattr(voices, "CLIPS_EACH", 3)
    prompts = {f"digits/{n}": tone(1.5) for n in range(5)}
    prompts |= {"short": tone(0.8), "silence/1": tone(2.0), "beep": tone(2.0), "faint": tone(2.0, peak=0.0005)}
    write_package(tmp_path, "es", prompts)
    found = list(voices.other_voices({"asterisk-prompt-es-co": tmp_path}))
    assert len(found) == 3
    assert all(clip.key.startswith("es-co_digits_") for clip in found)
    assert {clip.shards for clip in found} == {"voices-other-phone-test"}
    assert {clip.record["language_name"] for clip in found} == {"Spanish"}
    assert list(voices.licences({"asterisk-prompt-es-co": tmp_path}))[-1] == "GPL by Somebody"
    with pytest.raises(UserError, match=r"no \.gsm files"):
        list(voices.other_voices({"asterisk-prompt-fr-armelle": tmp_path}))


def test_known_voices_are_test_clips_only_with_and_without_the_telephone():
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(24_000) * 3_000).astype(np.int16)
    clips = [Clip("asterisk", f"en_{n}", noise, {"source": f"say {n}", "language": "en"}) for n in range(60)]
    tests = {clip.key for clip in clips if split_of(clip.record["source"]) == "test"}
    clips.append(Clip("asterisk", "en_short", noise[:8_000], {"source": "x", "language": "en"}, "test"))
    found = list(voices.known_voices(clips))
    assert 0 < len(tests) < 60
    for stem in ("voices-known", "voices-known-phone"):
        assert {clip.key for clip in found if clip.stem == stem} == tests
    plain, phone = (np.abs(np.fft.rfft(clip.samples)) for clip in found[:2])
    above = np.fft.rfftfreq(24_000, 1 / 16_000) > 4_200
    assert phone[above].mean() < 0.02 * plain[above].mean()
    assert phone[~above].mean() > 0.3 * plain[~above].mean()


def test_no_mix_that_trains_holds_a_test_voice():
    for path in sorted((CARDS.parent).glob("*/*.yaml")):
        if path.parent.name in ("mini", "generated", "report") and path.stem != "voices":
            assert "voices_" not in path.read_text(), path
    for path in sorted(CARDS.glob("voices_*.yaml")):
        assert read_card(path).held_out.share == 1.0
        assert "-test-" in read_card(path).shards
