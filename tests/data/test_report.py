"""The cards and mixes of the MiDashengLM report against its Tables 14-18, its Figure 6 and its published prompts."""

import re
from collections import Counter

import pytest
import yaml

from midasheng.data.manifest import read_card, read_mix
from tests.conftest import CONFIGS

MANIFESTS = CONFIGS.parent / "data_manifests"
REPORT = MANIFESTS / "report"
MIXES = ("align", "pretrain", "sft")
RAW = {p.stem: yaml.safe_load(p.read_text(encoding="utf-8")) for p in (MANIFESTS / "corpora").glob("*.yaml")}
CARDS = {name: card for name, card in RAW.items() if "dataset" in card}

# Tables 14-18: dataset | tasks | hours (QA: pairs) | used in SFT
TABLES = {
    "speech": """
        LibriSpeech | asr | 960 | y
        LibriHeavy | asr | 50000 | n
        GigaSpeech | asr | 10000 | y
        GigaSpeech 2 | asr | 30000 | y
        WeNetSpeech | asr | 10000 | y
        YODAS | asr | 320000 | n
        CommonVoice-17.0 | asr | 5000 | y
        AISHELL-1 | asr | 100 | y
        AISHELL-2 | asr | 1000 | y
        AISHELL-3 | asr | 70 | y
        LJSpeech-1.1 | asr | 37 | n
        LibriTTS | asr | 585 | n
        MultiLingualSpokenWords | keyword | 5000 | n
        Emilia | asr | 101000 | y
        CovoST-v2 | s2tt | 2880 | y
        Fleurs | s2tt | 1224 | n
        MSR-86K | asr language | 86000 | y
        ACAV100M-Speech | asr | 55754 | n
        Must-C | asr s2tt | 1000 | y
        MLS | asr | 50000 | n
        SpgiSpeech | asr | 5000 | n
        People's Speech | asr | 30000 | n
        KeSpeech | asr | 1400 | y
        LAION-Audio-300M | caption | 230000 | n
    """,
    "sound": """
        FSD50k | sound_event | 77 | y
        AudioSet | sound_event | 5200 | y
        AudioSet-strong | sound_event | 220 | n
        VGGSound | sound_event | 540 | y
        FSDKaggle2018 | sound_event | 20 | y
        FSDKaggle2019 | sound_event | 100 | y
        ARCA23k | sound_event | 120 | n
        AutoACD | sound_caption | 5200 | y
        AudioSetCaps | sound_caption | 6000 | y
        SoundVECaps | sound_caption | 5000 | y
        WavCaps | sound_caption | 7567 | y
        AudioCaps | sound_caption | 100 | y
        ClothoV2 | sound_caption | 17 | y
        TACOS | sound_caption | 98 | y
        CochlScene | soundscape | 500 | y
        BirdSet | soundscape | 7000 | n
        ACAVCaps | caption | 38662 | y
    """,
    "paralinguistic": """
        IEMOCAP | emotion | 8 | y
        MELD | emotion | 12 | y
        SUBESCO | emotion | 9 | n
        RAVDESS-Speech | emotion | 2 | n
        RAVDESS-Song | emotion | 1 | n
        CREMA-D | emotion | 4 | n
        ESD | emotion | 29 | n
        VocalSound | vocal_sound | 20 | y
        NonSpeech7k | vocal_sound | 3 | y
        VoxLingua107 | language | 7200 | y
        CommonLanguage | language | 45 | y
        YLACombe | speaker | 5 | n
        VoxCeleb1 | speaker | 76 | y
        CNCeleb | speaker | 2100 | y
        VoxCeleb2 | speaker age gender | 1000 | y
        VoxBlink1 | speaker | 1300 | y
        VoxBlink2 | speaker | 2600 | y
        VoxTube | speaker language gender | 5200 | y
        LibriCount | speaker_count | 8 | y
        FluentSpeechCommands | intent | 17 | n
        speechocean762 | gender age | 5 | n
        ASVSpoof5 | spoof | 603 | n
    """,
    "music": """
        MusicCaps | music_caption | 15 | y
        Songdescriber | music_caption | 23 | y
        LPMusicCaps-MTT | music_caption | 18 | y
        LPMusicCaps-MSD | music_caption | 1000 | y
        VocalSet | singing_style | 10 | n
        FreeMusicArchive | genre | 610 | y
        MTG-Jamendo | instrument genre | 3768 | y
        NSynth | instrument | 360 | y
        GoodSounds | instrument | 28 | y
        chMusic | instrument | 1 | y
        CTIS | instrument | 1 | y
    """,
    "qa": """
        AVQA | qa | 36114 | y
        ClothoAQA | qa | 6175 | y
        TACOS-QA | qa | 40019 | y
        MusicQA | qa | 112878 | y
        SIFT-50M closed | qa | 21430000 | y
        ACAV-QA | qa | 24371 | y
    """,
}
ROWS = {
    dataset: (table, tuple(tasks.split()), int(size), used == "y")
    for table, text in TABLES.items()
    for dataset, tasks, size, used in (line.strip().split(" | ") for line in text.strip().splitlines())
}
# table -> hours, and hours used in SFT, as the report prints them below its table
PRINTED = {
    "speech": (997_010, 258_410), "sound": (76_421, 69_081),
    "paralinguistic": (20_247, 19_572), "music": (5_824, 5_814),
}  # fmt: skip
# where its own rows sum to something else: rows minus printed
DISAGREES = {("speech", "SFT"): -9_000, ("music", "all"): 10, ("music", "SFT"): 10}


# -- the tables --------------------------------------------------------------------------------------------------------


def test_every_row_of_the_tables_has_cards_for_its_tasks_and_every_card_is_of_a_row():
    tasks = {dataset: sorted(c["task"] for c in CARDS.values() if c["dataset"] == dataset) for dataset in ROWS}
    assert tasks == {dataset: sorted(tasks) for dataset, (_, tasks, _, _) in ROWS.items()}
    assert {c["dataset"] for c in CARDS.values()} == ROWS.keys()
    assert set(RAW) - set(CARDS) == {
        c for c in RAW if c.startswith(("asterisk_", "generated_", "music_", "voices_"))
    }, "a card of the report tells no `dataset`"


@pytest.mark.parametrize("name", sorted(CARDS))
def test_the_size_of_a_card_is_that_of_the_table(name):
    """So cards of one dataset agree."""
    card, (table, _, size, _) = CARDS[name], ROWS[CARDS[name]["dataset"]]
    assert (card.get("hours"), card.get("n_pairs")) == ((None, size) if table == "qa" else (size, None))


def test_the_printed_totals_of_the_report_and_where_its_rows_sum_to_something_else():
    off = {}
    for table, (printed, printed_sft) in PRINTED.items():
        rows = [(size, used) for of, _, size, used in ROWS.values() if of == table]
        off[table, "all"] = sum(size for size, _ in rows) - printed
        off[table, "SFT"] = sum(size for size, used in rows if used) - printed_sft
    assert {where: by for where, by in off.items() if by} == DISAGREES


def test_hours_of_parts_are_near_those_of_the_card():
    """No language lost or in another unit; a part without hours gets something from what the others leave."""
    far = {}
    for name, card in CARDS.items():
        if parts := card.get("parts"):
            known = sum(parts.values())
            if 0 in parts.values():
                assert known < card["hours"], name
            else:
                far[name] = round(known / card["hours"], 2)
    assert far == {"commonvoice17": 1.91, "emilia": 1.01, "gigaspeech2": 0.94, "mls": 1.01}


# -- the figure --------------------------------------------------------------------------------------------------------

# Figure 6: group -> (its percentage, {slice it names: percentage}). Our names of slices; `rest` stands below the group.
FIGURE = {
    "pretrain": {
        "asr": (60.8, {
            "asr_en": 21.5, "asr_zh": 14.4, "asr_es": 5.1, "asr_fr": 3.2, "asr_ko": 3.1, "asr_pt": 2.7, "asr_de": 2.6,
            "asr_id": 2.0, "asr_vi": 2.0, "asr_th": 1.5,
        }),
        "captions": (25.1, {"sound_captions": 10.8, "acavcaps": 7.2, "laion_audio_300m": 7.2}),
        "sound event": (5.6, {"audioset": 2.2, "fsd50k": 1.4, "vggsound": 1.4}),
        "paralinguistic": (3.9, {"language_id": 2.7}),
        "music": (3.4, {"music_captions": 1.4, "instruments": 1.4}),
        "other": (0.9, {}),
        "QA": (0.4, {}),
    },
    "sft": {
        "sound event": (22.6, {
            "sound_qa": 7.5, "audioset": 2.5, "cochlscene": 2.5, "fsd50k": 2.5, "sound_event": 2.5, "vggsound": 2.5,
            "vocalsound": 2.5,
        }),
        "asr": (16.1, {"asr_en": 5, "asr_zh": 5, "asr_fr": 1.5, "asr_id": 1.5, "asr_th": 1.5, "asr_vi": 1.5}),
        "QA": (15.1, {"acav_qa": 7.5, "sift50m": 7.5}),
        "paralinguistic": (13.6, {"language_id": 5, "speaker": 5, "gender": 2.5}),
        "music": (13.1, {"musicqa": 5, "music_captions": 2.5, "genre": 2.5, "instruments": 2.5}),
        "captions": (12.6, {"sound_captions": 7.5, "acavcaps": 5}),
        "other": (7.0, {"nonspeech7k": 2.5, "translate_en_zh": 1.5, "translate_zh_en": 1.5}),
    },
}  # fmt: skip
# what of a group the figure does not name
REST = {
    "pretrain": {
        "asr": "asr_rest", "sound event": "sound_event_rest", "paralinguistic": "paralinguistic_rest",
        "music": "music_rest", "other": "other", "QA": "questions",
    },
    "sft": {"paralinguistic": "paralinguistic_rest", "music": "mtg_jamendo", "other": "other_rest"},
}  # fmt: skip
# slices minus group: rounding of the figure
ROUNDED = {
    "pretrain": {"captions": 0.1},
    "sft": {"sound event": -0.1, "asr": -0.1, "QA": -0.1, "captions": -0.1},
}
# slice -> tasks of what may be in it
HOLDS = {
    "sound_captions": {"sound_caption"}, "sound_event": {"sound_event"},
    "sound_event_rest": {"sound_event", "soundscape"}, "language_id": {"language"}, "speaker": {"speaker"},
    "gender": {"gender"}, "genre": {"genre"}, "music_captions": {"music_caption"}, "instruments": {"instrument"},
    "music_rest": {"genre", "singing_style"},
    "questions": {"qa"}, "sound_qa": {"qa"}, "translate_en_zh": {"s2tt"}, "translate_zh_en": {"s2tt"},
    "other": {"keyword", "s2tt", "intent", "spoof"}, "other_rest": {"s2tt"},
    "paralinguistic_rest": {"emotion", "vocal_sound", "speaker", "age", "gender", "speaker_count"},
}  # fmt: skip


def lines(mix: str) -> dict[str, tuple[float, list[str]]]:
    """Line of a mix -> (its percentage, the corpora that it names)."""
    content = yaml.safe_load((REPORT / f"{mix}.yaml").read_text(encoding="utf-8"))["corpora"]
    return {
        name: (line["percent"], line["of"]) if isinstance(line, dict) else (line, [name])
        for name, line in content.items()
    }


@pytest.mark.parametrize("mix", FIGURE)
def test_slices_have_the_percentages_of_the_figure_and_sum_to_its_groups(mix):
    percent = {name: share for name, (share, _) in lines(mix).items()}
    named = {name: share for _, slices in FIGURE[mix].values() for name, share in slices.items()}
    assert {name: percent.get(name) for name in named} == named
    assert percent.keys() - named == set(REST[mix].values())
    off = {}
    for group, (share, slices) in FIGURE[mix].items():
        rest = percent[REST[mix][group]] if group in REST[mix] else 0
        off[group] = round(sum(slices.values()) + rest - share, 6)
    assert {group: by for group, by in off.items() if by} == ROUNDED[mix]
    assert sum(share for share, _ in FIGURE[mix].values()) == pytest.approx(100.1)


@pytest.mark.parametrize("mix", FIGURE)
def test_a_slice_holds_its_task_and_a_language_its_language(mix):
    for name, (_, of) in lines(mix).items():
        cards = [read_card(MANIFESTS / "corpora" / f"{c}.yaml", part) for c, _, part in (o.partition(".") for o in of)]
        if name in HOLDS:
            assert {c.task for c in cards} <= HOLDS[name], name
        if name.startswith("asr_"):
            assert {c.task for c in cards} == {"asr"}, name
            spoken = {tuple(c.languages) for c in cards}
            if name == "asr_rest":
                assert not spoken & {(slice.removeprefix("asr_"),) for slice in lines(mix)}
            else:
                assert spoken == {(name.removeprefix("asr_"),)}, name


def used(mix: str) -> list[str]:
    """Corpora of a mix, parts as such."""
    return [c.name for c in read_mix(mix, REPORT).cards]


def bare(names: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_alignment_is_acavcaps_alone():
    assert used("align") == ["acavcaps"]


def test_fine_tuning_uses_exactly_the_corpora_that_the_tables_mark():
    marked = {name for name, card in CARDS.items() if ROWS[card["dataset"]][3]}
    assert bare(used("sft")) == marked


def test_pretraining_uses_every_corpus_and_of_the_questions_only_these_three():
    qa = {name for name, card in CARDS.items() if card["task"] == "qa"}
    assert bare(used("pretrain")) == CARDS.keys() - qa | {"avqa", "musicqa", "clothoaqa"}


def test_pretraining_uses_every_part_of_a_corpus():
    parts = [f"{name}.{part}" for name, card in CARDS.items() for part in card.get("parts", ())]
    assert sorted(c for c in used("pretrain") if "." in c) == sorted(parts)


# -- prompts -----------------------------------------------------------------------------------------------------------

# Byte for byte, as published: first the report's evaluation (dasheng-lm, evaluate/prompt.csv), then xares-llm.
# A corpus of several languages takes the tag from the record; the published slip "in to text <|vi|>" is not trained on.
ASR = "Transcribe the speech into text <|{}|>"
OPEN = "{question} Answer with 1-2 sentences"
SPEAKERS = ["Are the two speakers in this utterance the same?", "Are the two speakers the same or different?"]
LANGUAGE = ["What language is spoken?", "Classify the language."]
OF_TASK = {
    "caption": ["Write a general audio caption"],
    "sound_caption": ["Write an audio caption describing the sound"],
    "music_caption": ["Caption this music track"],
    "sound_event": ["Which labels describe the sound?"],
    "soundscape": ["what's the environmental sound heard?"],
    "language": LANGUAGE,
    "gender": ["What gender is the speaker?"],
    "emotion": ["Identify the emotion expressed in the speech."],
    "vocal_sound": ["Classify the vocal sound."],
    "speaker": SPEAKERS,
    "speaker_count": ["Count the amount of speakers."],
    "keyword": ["Classify the keyword."],
    "intent": ["Identify the command, action, and object from the speech."],
    "spoof": ["Detect if the audio is genuine or a spoof."],
    "instrument": ["What's the music instrument?"],
    "genre": ["What's the music genre?"],
    "qa": [OPEN],
}
OF_CARD = {
    "vggsound": ["Which label describes the sound?"],
    "arca23k": ["Which label describes the sound?"],  # one label each
    "fsdkaggle2018": ["What sound is heard?", "Multi-label classification for FSDKaggle2018"],
    "fsd50k": ["Which labels describe the sound?", "Multi-label classification for FSD50k"],
    "clotho2": ["Write an audio caption describing the sound", "Generate a short caption for the audio."],
    "songdescriber": ["Caption this music track", "Generate a caption for the music"],
    "nsynth": ["What's the music instrument?", "Classify the music instrument."],
    "fma": ["What's the music genre?", "Classify the music genre (FMA)."],
    "sift50m": [],  # the corpus' own questions
}
SECOND = {"en": ["Transcribe the English speech into text"], "zh": ["Transcribe the Chinese speech into text."]}
NOT_PUBLISHED = {
    "s2tt": ["Translate the speech into {target_language}"],
    "age": ["How old is the speaker?"],
    "singing_style": ["What's the singing style?"],
}


@pytest.mark.parametrize("name", sorted(CARDS))
def test_prompts_are_the_published_ones_byte_for_byte(name):
    card = CARDS[name]
    text = (MANIFESTS / "corpora" / f"{name}.yaml").read_text(encoding="utf-8")
    assert ("# not published; ours" in text) == (card["task"] in NOT_PUBLISHED)
    if card["task"] == "asr":
        (language,) = card["languages"] if len(card["languages"]) == 1 else ["{language}"]
        wanted = [ASR.format(language), *SECOND.get(language, [])]
    else:
        wanted = OF_CARD.get(name, (OF_TASK | NOT_PUBLISHED)[card["task"]])
    assert card.get("prompts", []) == wanted


def test_prompts_by_task_are_the_first_ones_of_the_cards():
    """`make prepare TASK=...` asks as the report's corpora do."""
    by_task = yaml.safe_load((MANIFESTS / "prompts.yaml").read_text(encoding="utf-8"))
    first = {task: prompts[:1] for task, prompts in OF_TASK.items() if task != "qa"}
    assert by_task == first | {"asr": [ASR.format("{language}")]}


# -- every card --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CARDS))
def test_a_card_says_licence_and_home_and_holds_out_by_source(name):
    card = CARDS[name]
    assert card["licence"].strip()
    assert card.get("homepage") == "unknown" or re.fullmatch(r"https?://[^\s/]+\.[^\s]+", card["homepage"])
    assert card["held_out"]["by"] == "source"
    assert 0 < card["held_out"]["share"] <= 0.01
    assert card["held_out"]["max"] == 256
    languages = card["languages"]  # ISO 639-1: Norwegian must be written "no"
    assert all(isinstance(one, str) and re.fullmatch("[a-z]{2}", one) for one in languages)
    assert len(languages) == len(set(languages))
    first = (MANIFESTS / "corpora" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    table = 14 + list(TABLES).index(ROWS[card["dataset"]][0])
    assert first.startswith(f"# {card['dataset']}: ")
    assert f"(MiDashengLM report, Table {table})" in first


# cards that read the shards of another card of their dataset
LIE_WITH = {
    "mustc_s2tt": "mustc", "msr86k_language": "msr86k", "speechocean762_age": "speechocean762",
    "mtg_jamendo_genre": "mtg_jamendo", "voxceleb2_age": "voxceleb2_gender", "voxtube_language": "voxtube_gender",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CARDS))
def test_shards_lie_where_prepare_puts_them(name):
    """OUT/shards/NAME-train-*.tar, OUT being NAME below data.root."""
    card, home = CARDS[name], LIE_WITH.get(name, name)
    part = ".<part>" if "parts" in card else ""
    assert card["shards"] == f"{home}{part}/shards/{home}{part}-train-*.tar"
    if home != name:
        other = CARDS[home]
        same = ("dataset", "held_out", "parts", "languages", "licence", "homepage")
        assert {k: card.get(k) for k in same} == {k: other.get(k) for k in same}
        assert card["answer"] != other["answer"], "two tasks of one record need a field each"


def test_gender_age_and_language_are_not_asked_of_clips_that_hold_two_utterances():
    pairs = {c["shards"] for c in CARDS.values() if c["task"] == "speaker"}
    assert not pairs & {c["shards"] for c in CARDS.values() if c["task"] != "speaker"}


@pytest.mark.parametrize("mix", MIXES)
def test_cards_of_a_mix_that_share_shards_hold_out_the_same_records(mix):
    """What is held out depends on all shards of a card: a pattern that spans the parts of another card would leak."""
    rules = {}
    for card in read_mix(mix, REPORT).cards:
        assert rules.setdefault(card.shards, card.held_out) == card.held_out
    folders = Counter(shards.partition("/")[0] for shards in rules)
    assert max(folders.values()) == 1
    assert not [folder for folder in folders if re.search(r"[*?\[{<]", folder)]
