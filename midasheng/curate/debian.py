"""Debian packages without root: apt-get download, by private package lists where needed, and dpkg -x."""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from midasheng.config import UserError


def download(packages: Sequence[str], downloads: Path) -> list[Path]:
    """The .deb files of `packages` in `downloads`, in this order; what is not there yet is fetched.

    Raises UserError naming what is missing: apt-get, the network, or a package.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if _newest(package, downloads) is None]
    if missing:
        _apt_download(missing, downloads)
    debs = [deb for package in packages if (deb := _newest(package, downloads))]
    assert len(debs) == len(packages), f"{len(packages)} packages have {len(debs)} files in {downloads}: {packages}"
    return debs


def unpack(deb: Path) -> Path:
    """Unpack a .deb next to itself, once; returns the folder. Raises UserError for a damaged package."""
    folder = deb.parent / "unpacked" / deb.name.removesuffix(".deb")
    if folder.is_dir():
        return folder
    if shutil.which("dpkg") is None:
        raise UserError(f"dpkg is not installed here, and {deb.name} must be unpacked: install the package dpkg")
    unready = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unready, ignore_errors=True)
    unready.mkdir(parents=True)
    result = _run(["dpkg", "-x", str(deb.resolve()), str(unready.resolve())], deb.parent)
    if result.returncode != 0:
        raise UserError(f"{deb} does not unpack; delete it and run again:\n{result.stderr.strip()}")
    os.replace(unready, folder)
    return folder


def version(deb: Path) -> str:
    """The version that the name of a .deb file states."""
    return unquote(deb.name.split("_")[1])


def _newest(package: str, downloads: Path) -> Path | None:
    """The last of the downloaded versions of `package`, by file name."""
    return max(downloads.glob(f"{package}_*.deb"), default=None)


def _apt_download(packages: Sequence[str], downloads: Path, attempts: int = 4) -> None:
    """Fetch `packages` with apt-get, by private package lists where the machine's own do not serve."""
    if shutil.which("apt-get") is None:
        raise UserError(
            f"apt-get is not installed here. Download these Debian packages elsewhere "
            f"(https://packages.debian.org) and put the .deb files into {downloads}: {' '.join(packages)}"
        )
    incoming = downloads / "incoming"
    incoming.mkdir(exist_ok=True)
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *packages]
    result = _run(command, incoming)
    for attempt in range(attempts - 1):
        if result.returncode == 0:
            break
        time.sleep(2**attempt - 1)
        private = _private_apt(downloads / "apt")
        result = _run(["apt-get", "-qq", *private, "update"], incoming)
        if result.returncode == 0:
            result = _run([*command[:1], *private, *command[1:]], incoming)
    if result.returncode != 0:
        raise UserError(
            f"apt-get could not download {' '.join(packages)} in {attempts} attempts:\n"
            f"{result.stderr.strip()}\n"
            f"Check the network and the Debian sources here, or put the .deb files into {downloads}."
        )
    for deb in sorted(incoming.glob("*.deb")):
        os.replace(deb, downloads / deb.name)  # only now: a file here is a whole file
    shutil.rmtree(incoming)


def _private_apt(folder: Path) -> list[str]:
    """Options that keep apt's lists and cache in `folder`, so that `apt-get update` needs no root."""
    folder = folder.resolve()
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    places = {"Dir::State": "state", "Dir::State::lists": "state/lists", "Dir::Cache": "cache"}
    options = [f"{option}={folder / name}" for option, name in places.items()]
    return [word for option in ["APT::Sandbox::User=root", *options] for word in ("-o", option)]


def _run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"LC_ALL": "C"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
