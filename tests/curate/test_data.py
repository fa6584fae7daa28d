"""The command that prepares the mini data: prompts from the cards, and mistakes in one line."""

import pytest
import yaml

from midasheng.config import UserError
from stages import data

CARD = {"task": "asr", "shards": "x-*.tar", "licence": "none", "answer": "text"}


def write_card(folder, name, *prompts):
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **CARD, "prompts": list(prompts)}))


def test_prompts_do_not_depend_on_the_number_of_cards(tmp_path):
    with pytest.raises(UserError, match=r"no asterisk_\*"):
        data.card_prompts(tmp_path, ["asterisk_*"])
    write_card(tmp_path, "asterisk_a", "Write.", "Transcribe.")
    write_card(tmp_path, "asterisk_b", "Describe.")
    write_card(tmp_path, "other", "Sing.")
    prompts = data.card_prompts(tmp_path, ["asterisk_*"])
    write_card(tmp_path, "asterisk_0", "Write.", "Describe.")
    assert prompts == data.card_prompts(tmp_path, ["asterisk_*"]) == ["Describe.", "Transcribe.", "Write."]


def test_a_mistake_ends_in_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["data", "--out", str(tmp_path / "mini")])
    monkeypatch.setattr("midasheng.curate.debian.shutil.which", lambda _: None)
    assert data.main() == 2
    assert capsys.readouterr().err.startswith("error: apt-get is not installed here.")
    assert not (tmp_path / "mini").exists()


def test_the_generated_corpus_needs_no_packages_and_is_announced(tmp_path, monkeypatch, capsys):
    """Where there is no apt-get; the other way is a run on real recordings (tests/test_mini.py)."""
    monkeypatch.setattr("sys.argv", ["data", "--out", str(tmp_path / "generated"), "--generated"])
    monkeypatch.setattr("midasheng.curate.debian.shutil.which", lambda _: None)
    assert data.main() == 0
    said = capsys.readouterr().out
    assert "GENERATED" in said
    assert "generated-beats" in said
    assert "CC0" in (tmp_path / "generated/LICENCES").read_text()
    assert data.main() == 0
    assert "was complete already" in capsys.readouterr().out
