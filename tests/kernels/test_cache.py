"""The cache of generated files: what it refuses, what replaces it, and many processes at once."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from attnopt.errors import CacheError
from attnopt.kernels import cache, ownership

ROOT = Path(__file__).resolve().parents[2]
KEY = cache.key("a source")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder asked for; the process has no stand-in yet."""
    monkeypatch.setenv(cache.ENV, str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_private", None)
    monkeypatch.setattr(cache, "_warned", set())
    return tmp_path / "cache"


def refused(root: Path) -> bool:
    """Whether a temporary folder replaces the one that was asked for."""
    found = cache.directory()
    assert found == root or stat.S_IMODE(found.stat().st_mode) == 0o700
    return found != root


def belongs_to(monkeypatch: pytest.MonkeyPatch, path: Path, uid: int) -> None:
    """Let the system say that `path` belongs to someone else."""
    lstat = Path.lstat

    def other(self: Path) -> os.stat_result:
        info = lstat(self)
        return os.stat_result((*info[:4], uid, *info[5:10])) if self == path else info

    monkeypatch.setattr(Path, "lstat", other)


def test_key_stands_for_the_parts_and_their_order() -> None:
    keys = {cache.key(), cache.key("ab"), cache.key("a", "b"), cache.key("b", "a"),
            cache.key(b"ab"), cache.key("", "ab"), cache.key("1:a", "b")}
    assert len(keys) == 7
    assert cache.key("a", "b") == cache.key("a", "b")


def test_where(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.directory() == root
    monkeypatch.delenv(cache.ENV)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg" / "attnopt"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, so to be ignored")
    assert cache.directory() == tmp_path / ".cache" / "attnopt"
    monkeypatch.setenv(cache.ENV, "~/mine")
    assert cache.directory() == tmp_path / "mine"


def test_store_and_find(root: Path) -> None:
    assert cache.find("cpp", KEY, ".cpp") is None
    assert not root.exists(), "looking makes nothing"
    path = cache.store("cpp", KEY, ".cpp", b"int x;")
    assert path == root / "cpp" / f"{KEY}.cpp" == cache.find("cpp", KEY, ".cpp")
    assert path.read_bytes() == b"int x;"
    cache.store("cpp", KEY, ".cpp", b"int y;")
    assert path.read_bytes() == b"int y;"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (root, path.parent, path)]
    assert modes == [0o700, 0o700, 0o600]
    assert cache.find("cpp", KEY, ".so") is None and cache.find("triton", KEY, ".cpp") is None
    assert cache.vouches(path)
    assert not cache.vouches(path.with_suffix(".so"))


@pytest.mark.parametrize("name", [("../cpp", KEY, ".so"), ("cpp", "../" + KEY[3:], ".so"),
                                  ("cpp", KEY, "so"), ("cpp", KEY, "./../x"), ("", KEY, ".so"),
                                  ("cpp", KEY.upper(), ".so")])
def test_names_that_cannot_be(root: Path, name: tuple[str, str, str]) -> None:
    with pytest.raises(CacheError, match="must match"):
        cache.store(*name, b"")
    with pytest.raises(CacheError, match="must match"):
        cache.find(*name)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_refused(
    root: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = cache.store("cpp", KEY, ".so", b"x")
    root.chmod(mode)
    assert refused(root) and refused(root)
    assert caplog.text.count("must not be writable by others") == 1, "one warning"
    assert not cache.vouches(path)
    assert cache.find("cpp", KEY, ".so") is None
    stand_in = cache.store("cpp", KEY, ".so", b"x")
    assert cache.vouches(stand_in) and root not in stand_in.parents


def test_others_may_read(root: Path) -> None:
    root.mkdir(0o755)
    assert not refused(root)


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_way_that_others_may_write_is_refused(root: Path, mode: int) -> None:
    path = cache.store("cpp", KEY, ".so", b"x")
    root.parent.chmod(mode)
    try:
        if mode == 0o777:
            assert refused(root) and not cache.vouches(path)
            root.parent.chmod(0o1777)
            assert not refused(root), "in a sticky folder nobody can exchange it"
        else:
            assert refused(root) != ownership._private_group(root.parent.stat().st_gid)
    finally:
        root.parent.chmod(0o700)


@pytest.mark.parametrize("change", ["file mode", "folder mode", "link", "folder"])
def test_a_file_that_others_may_write_is_not_found(root: Path, change: str) -> None:
    path = cache.store("cpp", KEY, ".so", b"x")
    if change == "file mode":
        path.chmod(0o660)
    elif change == "folder mode":
        path.parent.chmod(0o777)
    else:
        path.rename(root / "elsewhere")
        path.symlink_to(root / "elsewhere") if change == "link" else path.mkdir()
    assert cache.find("cpp", KEY, ".so") is None


@pytest.mark.parametrize("what", ["root", "parent", "kind", "file"])
def test_a_wrong_owner_is_refused(
    root: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache.store("cpp", KEY, ".so", b"x")
    place = {"root": root, "parent": root.parent, "kind": path.parent, "file": path}[what]
    belongs_to(monkeypatch, place, 12345)
    assert cache.find("cpp", KEY, ".so") is None
    assert refused(root) == (what in ("root", "parent"))


def test_root_owns_the_way_but_not_the_cache(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.mkdir(0o700)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    for path in (root, *root.parents):
        if path.stat().st_uid != 0:
            belongs_to(monkeypatch, path, 0)
    assert cache.directory() != root


def test_links(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir(0o700)
    root.symlink_to("real")
    assert not refused(root)
    path = cache.store("cpp", KEY, ".so", b"x")
    assert cache.vouches(path)
    (tmp_path / "real").chmod(0o777)
    assert refused(root) and not cache.vouches(path)
    (tmp_path / "real").chmod(0o700)
    belongs_to(monkeypatch, root, 12345)
    assert refused(root), "the owner of the link can lead it anywhere"


def test_a_link_through_a_folder_of_others(root: Path, tmp_path: Path) -> None:
    (tmp_path / "open" / "real").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    root.symlink_to(tmp_path / "open" / ".." / "open" / "real")
    assert refused(root)
    (tmp_path / "open").chmod(0o700)
    assert not refused(root)


def test_a_circle_of_links(root: Path, tmp_path: Path) -> None:
    root.symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(root)
    assert refused(root)
    with pytest.raises((CacheError, OSError)):
        ownership.check_folder(root)


def test_places_where_nothing_can_be_made(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/attnopt")):
        monkeypatch.setenv(cache.ENV, str(place))
        assert refused(place)
    assert caplog.text.count("kept for this process only") == 2, "one for each reason"
    monkeypatch.delenv(cache.ENV)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert refused(Path())
    assert "there is no home folder" in caplog.text


def test_a_cache_that_can_only_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache.store("cpp", KEY, ".so", b"x")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cache.find("cpp", KEY, ".so") == path
    other = cache.store("cpp", cache.key("other"), ".so", b"y")
    assert root not in other.parents
    assert {e.path for e in cache.entries()} == {path, other}


def test_no_temporary_folder_either(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> str:
        raise OSError("no space")

    monkeypatch.setattr(cache.tempfile, "mkdtemp", full)
    root.write_text("")
    with pytest.raises(CacheError, match="no folder for generated files"):
        cache.directory()


def test_a_disk_that_is_full(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match="cannot be written: no space"):
        cache.store("cpp", KEY, ".so", b"x")
    assert list((root / "cpp").iterdir()) == []


def test_entries_and_clear(root: Path) -> None:
    assert cache.entries() == [] and cache.clear() == (0, 0)
    paths = [cache.store(kind, KEY, suffix, b"12345")
             for kind, suffix in (("cpp", ".cpp"), ("cpp", ".so"), ("triton", ".py"))]
    strangers = [root / "notes.txt", root / "cpp" / "notes.txt", root / "Other" / f"{KEY}.so"]
    for path in strangers:
        path.parent.mkdir(exist_ok=True)
        path.write_text("kept")
    unfinished = [root / "cpp" / f"{KEY}.{name}.unfinished" for name in ("new", "old")]
    for path in unfinished:
        path.write_text("x")
    os.utime(unfinished[1], (0, 0))
    assert [e.path for e in cache.entries()] == paths
    assert [(e.kind, e.key, e.suffix, e.size) for e in cache.entries()][0] == (
        "cpp", KEY, ".cpp", 5)
    assert cache.clear() == (3, 15)
    assert not any(path.exists() for path in paths)
    assert all(path.exists() for path in strangers)
    assert unfinished[0].exists() and not unfinished[1].exists()
    assert cache.entries() == []


STORM = """
import sys
from attnopt.kernels import cache
key, data = cache.key("storm"), b"0123456789" * 20000
for turn in range(40):
    found = cache.find("cpp", key, ".so")
    assert found is None or found.read_bytes() == data
    path = cache.store("cpp", key, ".so", data)
    assert cache.find("cpp", key, ".so") == path and path.read_bytes() == data
"""


def test_many_processes_at_once(root: Path) -> None:
    """All store and find one key, from an empty cache on; none sees half a file."""
    workers = [subprocess.Popen([sys.executable, "-c", STORM], cwd=ROOT, stderr=subprocess.PIPE)
               for _ in range(4)]
    for worker in workers:
        _, said = worker.communicate()
        assert worker.returncode == 0, said.decode()
    assert [e.size for e in cache.entries()] == [200000]
    assert len(list((root / "cpp").iterdir())) == 1


def test_the_stand_in_goes_with_the_process(tmp_path: Path) -> None:
    code = "from attnopt.kernels import cache; print(cache.directory())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True,
        env={**os.environ, cache.ENV: "/proc/attnopt", "TMPDIR": str(tmp_path)})
    assert Path(done.stdout.strip()).parent == tmp_path.resolve()
    assert list(tmp_path.iterdir()) == []
