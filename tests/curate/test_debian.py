"""Packages come by apt-get, by private lists where the machine's own do not serve, or not at all, with a reason."""

import shutil
import subprocess

import pytest

from midasheng.config import UserError
from midasheng.curate import debian


def test_download_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(debian.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"apt-get is not installed.*sounds-en sounds-fr"):
        debian.download(["sounds-en", "sounds-fr"], tmp_path)


def test_apt_falls_back_to_private_package_lists(tmp_path, monkeypatch):
    commands = []

    def run(command, folder):
        commands.append(" ".join(command))
        has_lists = "Dir::State=" in commands[-1]
        if "download" in command and has_lists:
            (folder / "sounds-en_1_all.deb").write_bytes(b"deb")
        return subprocess.CompletedProcess(command, 0 if has_lists else 100, "", "E: Unable to locate package")

    monkeypatch.setattr(debian, "_run", run)
    monkeypatch.setattr(debian.shutil, "which", lambda name: name)
    (deb,) = debian.download(["sounds-en"], tmp_path)
    assert (deb, deb.read_bytes()) == (tmp_path / "sounds-en_1_all.deb", b"deb")
    assert len(commands) == 3
    assert commands[1].endswith("update")
    assert str(tmp_path / "apt") in commands[1]
    monkeypatch.setattr(debian, "_run", lambda command, _: subprocess.CompletedProcess(command, 100, "", "no route"))
    monkeypatch.setattr(debian.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match=r"(?s)could not download other.*no route"):
        debian.download(["sounds-en", "other"], tmp_path)


def test_newest_version_is_used_and_named(tmp_path):
    for name in ("sounds_1.6_all.deb", "sounds_2%3a1.0_all.deb", "sounds-g722_3_all.deb"):
        (tmp_path / name).touch()
    (deb,) = debian.download(["sounds"], tmp_path)
    assert (deb.name, debian.version(deb)) == ("sounds_2%3a1.0_all.deb", "2:1.0")


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="unpacks with dpkg")
def test_damaged_package_leaves_nothing_unpacked(tmp_path):
    deb = tmp_path / "sounds_1_all.deb"
    deb.write_bytes(b"not a package")
    for _ in range(2):
        with pytest.raises(UserError, match="does not unpack; delete it"):
            debian.unpack(deb)
