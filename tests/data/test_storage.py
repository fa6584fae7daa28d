"""Every byte that is asked for comes, or it is said what is wrong; from a disk and from a real HTTP server."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from torch.utils.data import DataLoader

from midasheng.data import storage
from midasheng.data.storage import (
    Place,
    ShardFile,
    StorageError,
    Unreachable,
    is_url,
    list_shards,
    local_copy,
    read_many,
)
from tests.data.server import SHORT, SILENT, TORN, WHOLE, Server

DATA = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    (tmp_path / "a.tar").write_bytes(DATA)
    made = Server(tmp_path)
    yield made
    made.close()


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Pauses and deadlines of a test, not of a run."""
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(storage, "DEADLINE_S", 1.0)
    monkeypatch.setattr(storage, "ATTEMPT_S", 1.0)


# -- ranges ------------------------------------------------------------------------------------------------------------

RANGES = [(0, 1), (0, len(DATA)), (1, 600), (5000, 512), (len(DATA) - 1, 1), (7, 0)]


@pytest.mark.parametrize(("offset", "size"), RANGES)
def test_a_range_is_the_same_bytes_from_a_disk_http_and_memory(server, offset, size):
    memory = "memory://ranges/a.tar"
    with fsspec.open(memory, "wb") as file:
        file.write(DATA)
    for path in (f"{server.root}/a.tar", f"{server.url}/a.tar", memory, f"file://{server.root}/a.tar"):
        assert Place(path, offset, size).read() == DATA[offset : offset + size], path


def test_only_the_range_travels(server):
    Place(f"{server.url}/a.tar", 1000, 24).read()
    assert server.asked == [("GET", "/a.tar", "bytes=1000-1023")]


def test_urls_and_paths_are_told_apart():
    assert [is_url(p) for p in ("/a/b.tar", "a:b/c.tar", "s3://b/c.tar", "memory://x")] == [False, False, True, True]


@pytest.mark.parametrize("path", ["{root}/gone.tar", "{url}/gone.tar", "memory://gone/gone.tar"])
def test_a_file_that_is_gone_is_said_at_once(server, path):
    path = path.format(root=server.root, url=server.url)
    start = time.monotonic()
    with pytest.raises(StorageError, match=rf"{path} is (gone|not there)"):
        Place(path, 0, 8).read()
    assert time.monotonic() - start < 2  # the deadline is 120 s
    assert len(server.asked) <= 1


def test_a_local_file_cut_short_is_a_hole_and_not_a_shorter_record(server):
    os.truncate(server.root / "a.tar", 1010)
    assert Place(f"{server.root}/a.tar", 1000, 10).read() == DATA[1000:1010]
    with pytest.raises(Unreachable, match=r"a\.tar: ends before byte 1011"):
        Place(f"{server.root}/a.tar", 1000, 11).read()


# -- what goes wrong with servers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [500, 503, 429, TORN, SHORT, WHOLE])
@pytest.mark.parametrize("failures", [1, 4])
def test_a_read_is_tried_again_until_it_is_whole(server, hasty, fault, failures):
    server.faults = [fault] * failures
    assert Place(f"{server.url}/a.tar", 700, 900).read() == DATA[700:1600]
    assert server.gets() == failures + 1


@pytest.mark.parametrize("fault", [500, TORN, SHORT, WHOLE])
def test_the_deadline_ends_in_unreachable_with_the_url(server, hasty, fault):
    server.always = fault
    start = time.monotonic()
    with pytest.raises(Unreachable, match=rf"{server.url}/a\.tar: \w+"):
        Place(f"{server.url}/a.tar", 700, 900).read()
    assert 0.3 < time.monotonic() - start < 3
    assert 4 < server.gets() < 12  # the pauses grow: 0.01 s doubled


def test_a_server_that_says_nothing_ends_the_attempt_and_not_the_worker(server, hasty, monkeypatch):
    monkeypatch.setattr(storage, "DEADLINE_S", 10.0)
    monkeypatch.setattr(storage, "ATTEMPT_S", 0.2)
    server.faults = [SILENT]
    start = time.monotonic()
    assert Place(f"{server.url}/a.tar", 3, 9).read() == DATA[3:12]
    assert time.monotonic() - start < 5
    server.always = SILENT
    monkeypatch.setattr(storage, "DEADLINE_S", 0.3)
    with pytest.raises(Unreachable, match=server.url):
        Place(f"{server.url}/a.tar", 3, 9).read()


@pytest.mark.parametrize("what", ["a listing", "a named shard", "a copy"])
def test_a_silent_server_does_not_hold_up_the_start(server, hasty, monkeypatch, what):
    """aiohttp itself would wait for five minutes."""
    monkeypatch.setattr(storage, "ATTEMPT_S", 0.2)
    monkeypatch.setattr(storage, "DEADLINE_S", 0.3)
    server.always = SILENT

    def use() -> None:
        if what == "a copy":
            with local_copy(ShardFile(f"{server.url}/a.tar", len(DATA), "")):
                pass
        list_shards(server.url, "*.tar" if what == "a listing" else "a.tar")

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(use)
        try:
            with pytest.raises(StorageError, match=server.url):
                future.result(timeout=8)
        finally:
            server.close()  # lets go of a request that hangs


def test_a_server_that_is_not_there_is_unreachable(server, hasty):
    server.close()
    with pytest.raises(Unreachable, match=server.url):
        Place(f"{server.url}/a.tar", 3, 9).read()


def test_a_file_that_became_shorter_on_its_server_is_unreachable(server, hasty):
    os.truncate(server.root / "a.tar", 1010)
    for offset in (1000, 2000):
        with pytest.raises(Unreachable, match=server.url):
            Place(f"{server.url}/a.tar", offset, 100).read()


# -- many at once ------------------------------------------------------------------------------------------------------


def test_many_reads_come_in_order_with_their_errors_among_them(server, hasty):
    (server.root / "short.tar").write_bytes(b"x")
    root, url = server.root, server.url
    places = [
        Place(f"{url}/a.tar", 0, 10), Place(f"{url}/gone.tar", 0, 10), Place(f"{root}/a.tar", 10, 10),
        Place(f"{url}/short.tar", 0, 10), Place(f"{url}/a.tar", 20, 10), Place(f"{root}/short.tar", 0, 10),
    ]  # fmt: skip
    kinds = [bytes, StorageError, bytes, Unreachable, bytes, Unreachable]
    for order in ([0, 1, 2, 3, 4, 5], [3, 0, 5, 4, 1, 2], [2, 5]):  # the last without any URL
        got = list(read_many([places[n] for n in order]))
        assert [type(g) for g in got] == [kinds[n] for n in order]
        for number, data in zip(order, got, strict=True):
            place = places[number]
            if isinstance(data, bytes):
                assert data == DATA[place.offset : place.offset + place.size]
            else:
                assert place.path in str(data)
    assert list(read_many([])) == []


def test_many_reads_run_side_by_side(server):
    server.delay_s = 0.2
    start = time.monotonic()
    got = list(read_many([Place(f"{server.url}/a.tar", 10 * n, 10) for n in range(8)]))
    assert time.monotonic() - start < 1.0  # one after the other: 1.6 s
    assert got == [DATA[10 * n : 10 * n + 10] for n in range(8)]
    assert server.most_at_once > 4


def test_one_bad_range_does_not_hold_up_the_others(server, hasty, monkeypatch):
    monkeypatch.setattr(storage, "DEADLINE_S", 1.5)
    (server.root / "short.tar").write_bytes(b"x")
    places = [Place(f"{server.url}/{name}.tar", 0, 10) for name in ("a", "a", "short")]
    start, came = time.monotonic(), []
    for _ in read_many(places):
        came.append(time.monotonic() - start)
    assert came[1] < 0.7 < came[2]


# -- forked workers ----------------------------------------------------------------------------------------------------


def _read_into(pipe, place: Place) -> None:
    pipe.send(place.read())


@pytest.mark.parametrize("through", ["reads of the same file", "its listing"])
def test_a_forked_process_reads_after_its_parent_has_used_http(server, through):
    """The parent's event loop does not live on in the child; fsspec refuses a file system made before the fork."""
    place = Place(f"{server.url}/a.tar", 256, 300)
    if through == "its listing":
        list_shards(server.url, "{a..a}.tar")
    else:
        place.read()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_read_into, args=(theirs, place))
    child.start()
    theirs.close()
    try:
        assert ours.poll(20), "nothing came from the forked process"
        assert ours.recv() == DATA[256:556]
    finally:
        child.kill()
        child.join()
    assert place.read() == DATA[256:556]  # and the parent still does


def test_dataloader_workers_read_http(server):
    places = [Place(f"{server.url}/a.tar", 100 * n, 100) for n in range(6)]
    list(read_many(places))
    loader = DataLoader(
        _Reads(places), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=30
    )  # fmt: skip
    assert list(loader) == [DATA[100 * n : 100 * n + 100] for n in range(6)]


class _Reads(list):
    def __getitem__(self, n: int) -> bytes:
        return next(iter(read_many([super().__getitem__(n)])))


# -- copies ------------------------------------------------------------------------------------------------------------


def test_a_local_copy_has_the_bytes_and_goes_away(server, monkeypatch):
    for size in (1, 7, len(DATA) - 1, len(DATA), 10**6):  # of one range
        monkeypatch.setattr(storage, "COPY_BYTES", size if size > 1 else len(DATA) // 40)
        with local_copy(ShardFile(f"{server.url}/a.tar", len(DATA), "")) as path:
            with open(path, "rb") as file:
                assert file.read() == DATA
        assert not os.path.exists(path)
    with local_copy(ShardFile(f"{server.root}/a.tar", len(DATA), "")) as path:
        assert path == f"{server.root}/a.tar"  # a local file is not copied


def test_a_shard_that_is_still_being_written_is_not_indexed(server, hasty):
    for where, size in ((server.root, len(DATA) - 1), (server.root, len(DATA) + 1), (server.url, len(DATA) + 1)):
        with pytest.raises(StorageError, match=r"a\.tar(:| changes)"):
            with local_copy(ShardFile(f"{where}/a.tar", size, "")):
                pass


@pytest.mark.parametrize("fault", [500, TORN])
def test_a_copy_is_tried_again(server, hasty, fault):
    server.faults = [fault] * 2
    with local_copy(ShardFile(f"{server.url}/a.tar", len(DATA), "")) as path, open(path, "rb") as file:
        assert file.read() == DATA


def test_a_copy_that_never_comes_names_its_url(server, hasty):
    server.always = 500
    with pytest.raises(StorageError, match=rf"cannot copy {server.url}/a\.tar"):
        with local_copy(ShardFile(f"{server.url}/a.tar", len(DATA), "")):
            pass
    server.always = None
    with pytest.raises(StorageError, match=r"gone\.tar is not there"):
        with local_copy(ShardFile(f"{server.url}/gone.tar", len(DATA), "")):
            pass


# -- listing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path) -> Server:
    for name, size in {"p-000.tar": 1, "p-001.tar": 2, "p-002.tar": 3, "sub/q.tar": 4, "p-x.txt": 5}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    made = Server(tmp_path)
    yield made
    made.close()


PATTERNS = {
    "p-*.tar": [1, 2, 3],
    "p-00?.tar": [1, 2, 3],
    "p-00[02].tar": [1, 3],
    "p-{000..002}.tar": [1, 2, 3],
    "p-{002,000}.tar": [1, 3],
    "{p-00{1..2},sub/q}.tar": [2, 3, 4],
    "{p-*,p-001}.tar": [1, 2, 3],
    "*/*.tar": [4],
    "p-001.tar": [2],
    "nothing-*.tar": [],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_name_the_same_shards_locally_as_webdataset_and_the_shell(shards, pattern):
    found = list_shards(str(shards.root), pattern)
    assert [s.size for s in found] == PATTERNS[pattern]
    assert [s.path for s in found] == sorted({s.path for s in found})
    assert all(os.path.getsize(s.path) == s.size for s in found)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if "?" not in p])
def test_patterns_name_the_same_shards_over_http(shards, pattern):
    """Of a listing page, and of names alone; `?` begins a query there."""
    for found in (list_shards(shards.url, pattern), list_shards(f"{shards.url}/", pattern)):
        assert [s.size for s in found] == PATTERNS[pattern]
        assert [s.path for s in found] == [
            s.path.replace(str(shards.root), shards.url) for s in list_shards(str(shards.root), pattern)
        ]


def test_a_pattern_that_is_a_url_stands_for_itself(shards, tmp_path):
    found = list_shards(str(tmp_path / "elsewhere"), shards.url + "/p-{000..001}.tar")
    assert [(s.path, s.size) for s in found] == [(f"{shards.url}/p-000.tar", 1), (f"{shards.url}/p-001.tar", 2)]
    assert [s.size for s in list_shards("http://127.0.0.1:9/no", f"file://{shards.root}/p-*.tar")] == [1, 2, 3]


def test_another_file_system_is_listed_and_read(shards):
    for name in ("b", "a"):
        with fsspec.open(f"memory://listed/{name}.tar", "wb") as file:
            file.write(name.encode() * 5)
    for root, pattern in (
        ("memory://listed", "*.tar"),
        ("memory://listed", "{b,a}.tar"),
        ("/", "memory://listed/?.tar"),
    ):
        found = list_shards(root, pattern)
        assert [s.size for s in found] == [5, 5]
        assert [Place(s.path, 0, 2).read() for s in found] == [b"aa", b"bb"]


@pytest.mark.parametrize("root", ["{root}", "{url}", "memory://nothing"])
def test_a_named_shard_that_is_missing_is_an_error_and_a_shorter_list_never(shards, root):
    root = root.format(root=shards.root, url=shards.url)
    with pytest.raises(StorageError, match=rf"{root}/p-003\.tar is not there"):
        list_shards(root, "p-00{3..3}.tar")
    if "memory" not in root:
        with pytest.raises(StorageError, match=r"p-003\.tar is not there"):
            list_shards(root, "p-{000..003}.tar")


def test_a_folder_named_like_a_shard_is_refused(shards):
    (shards.root / "p-009.tar").mkdir()
    with pytest.raises(StorageError, match=r"p-009\.tar is not there, or no plain file"):
        list_shards(str(shards.root), "p-*.tar")


def test_a_data_root_is_no_pattern(tmp_path):
    """/data/corpus[2] is a folder's name; read as a glob it finds nothing, or another folder."""
    for name in ("corpus[2]", "corpus2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tar").write_bytes(name.encode())
    (found,) = list_shards(str(tmp_path / "corpus[2]"), "*.tar")
    assert found.path == str(tmp_path / "corpus[2]" / "a.tar")


@pytest.mark.parametrize("kind", ["a disk", "http", "a file:// URL"])
def test_the_stamp_changes_with_bytes_of_the_same_size(shards, kind):
    root = {"a disk": str(shards.root), "http": shards.url, "a file:// URL": f"file://{shards.root}"}[kind]
    first = list_shards(root, "p-000.tar")
    assert list_shards(root, "p-000.tar") == first
    assert first[0].stamp
    (shards.root / "p-000.tar").write_bytes(b"y")
    os.utime(shards.root / "p-000.tar", (2_000_000_000, 2_000_000_000))
    assert list_shards(root, "p-000.tar") != first


def test_a_listing_is_tried_again(shards, hasty):
    shards.faults = [500, 500, 500]
    assert [s.size for s in list_shards(shards.url, "p-00{0..1}.tar")] == [1, 2]
    shards.faults = [500, 500, 500]
    assert [s.size for s in list_shards(shards.url, "p-00*.tar")] == [1, 2, 3]


@pytest.mark.parametrize("pattern", ["p-000.tar", "p-*.tar"])
def test_a_server_that_is_down_is_not_a_missing_shard(shards, hasty, pattern):
    shards.always = 500
    with pytest.raises(StorageError, match=rf"cannot list {shards.url}"):
        list_shards(shards.url, pattern)
