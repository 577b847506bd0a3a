"""A cache survives a kill at any moment and several writers; a full disk is said before it does harm."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import cache_kill
import killing
import pytest
import torch

from fastkd import files
from fastkd.cache import CacheWriter, Spec, TeacherCache
from fastkd.cache.format import read_index


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != "lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A cache that nothing interrupted, and how many durable operations it took."""
    folder = tmp_path_factory.mktemp("whole")
    killing.join(killing.start("cache_kill:write", str(folder / "cache"), count_file=folder / "operations"))
    assert {"index.json", "head.safetensors", "tokenizer/tokenizer.json"} < contents(folder / "cache").keys()
    return folder / "cache", int((folder / "operations").read_text())


def recorded(folder: Path) -> dict[str, tuple[int, int]]:
    """Shards that the index names, and which file each is."""
    if not (folder / "index.json").exists():
        return {}
    names = [shard.file for split in read_index(folder).splits.values() for shard in split.shards.values()]
    stats = {name: (folder / name).stat() for name in names}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_killed_before_each_fsync_and_rename(whole: tuple[Path, int], tmp_path: Path) -> None:
    """Whatever the moment, the same command ends with the same bytes, keeps what was whole and leaves nothing over."""
    reference, operations = whole
    assert operations > 30  # tokenizer, head, index; four shards with the index after each
    saved = 0
    for moment in range(1, operations + 1):
        folder = tmp_path / str(moment)
        killing.join(killing.start("cache_kill:write", str(folder), die_at=moment), -signal.SIGKILL)
        before = recorded(folder)
        saved += len(before)
        killing.join(killing.start("cache_kill:write", str(folder)))
        assert contents(folder) == contents(reference), moment
        after = recorded(folder)
        assert len(after) == 4 and before.items() <= after.items(), moment
        # a shard more is lost only while it is being written: 3 operations of its file, 2 of the index
        assert len(before) >= (moment - (operations - 4 * 6) - 1) // 6, moment
    assert saved > operations


@pytest.mark.parametrize("call", [1, 2, 5, 6])  # the head, the first index, the second shard and the index after it
def test_killed_in_the_middle_of_a_file(whole: tuple[Path, int], tmp_path: Path, call: int) -> None:
    moment = {"writer": "fastkd.files:put", "tear_at": call}
    killing.join(killing.start("cache_kill:write", str(tmp_path / "c"), **moment), -signal.SIGKILL)
    assert list((tmp_path / "c").glob(".part-*"))
    killing.join(killing.start("cache_kill:write", str(tmp_path / "c")))
    assert contents(tmp_path / "c") == contents(whole[0])


def meet(folder: Path, meeting: Path, others: int):
    return killing.start("cache_kill:write_beside", str(folder), str(meeting), others)


def test_two_processes_write_one_cache(whole: tuple[Path, int], tmp_path: Path) -> None:
    (tmp_path / "meeting").mkdir()
    children = [meet(tmp_path / "c", tmp_path / "meeting", 1) for _ in range(2)]
    for child in children:
        killing.join(child)
    wrote = [f.read_text().splitlines() for f in (tmp_path / "meeting").iterdir()]
    assert len(wrote) == 2 and all(wrote), "one of them did nothing"
    assert sorted(wrote[0] + wrote[1]) == ["eval 0", "train 0", "train 4", "train 8"], "a shard was written twice"
    assert contents(tmp_path / "c") == contents(whole[0])


def test_what_another_process_finished_is_not_made_again(whole: tuple[Path, int], tmp_path: Path) -> None:
    """This one opened the folder before the other wrote all of it."""
    writer = cache_kill.make_writer(tmp_path / "c")
    writer.open(cache_kill.fill_tokenizer)
    killing.join(killing.start("cache_kill:write", str(tmp_path / "c")))
    told: list[int] = []
    writer.run(lambda *_: pytest.fail("a shard was made again"), told.append)
    assert told[-1] == 13 and contents(tmp_path / "c") == contents(whole[0])


def test_the_shard_of_a_process_that_died_is_written_by_another(whole: tuple[Path, int], tmp_path: Path) -> None:
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    doomed = meet(tmp_path / "c", meeting, 2)  # never more than one other comes: it holds its shard until it dies
    deadline = time.monotonic() + 30
    while not list(meeting.iterdir()):
        assert time.monotonic() < deadline and doomed.is_alive()
        time.sleep(0.005)
    survivor = meet(tmp_path / "c", meeting, 1)
    while len(recorded(tmp_path / "c")) < 3:  # all but the one that is held
        assert time.monotonic() < deadline and survivor.is_alive()
        time.sleep(0.005)
    assert "train-00000000.safetensors" not in recorded(tmp_path / "c")
    os.kill(doomed.pid, signal.SIGKILL)
    killing.join(survivor)
    assert contents(tmp_path / "c") == contents(whole[0])


def test_sizes_are_predicted_and_a_full_disk_refused(tmp_path: Path, monkeypatch) -> None:
    writer = cache_kill.make_writer(tmp_path / "c")
    sizes = writer.predicted()
    usage, needed = shutil.disk_usage(tmp_path), sum(sizes.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(ValueError, match=r"MB free and the cache needs .* MB more \(train .* MB, eval .* MB, head "):
        writer.open()
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    writer.open()
    writer.run(cache_kill.compute)
    for name in ("train", "eval", "head"):
        written = sum(f.stat().st_size for f in (tmp_path / "c").glob(f"{name}*"))
        assert sizes[name] - 1000 * 3 < written <= sizes[name]
    index = (tmp_path / "c" / "index.json").stat().st_size
    assert sum(f.stat().st_size for f in (tmp_path / "c").iterdir()) - index <= needed


def test_what_is_there_counts_towards_the_disk(tmp_path: Path, monkeypatch) -> None:
    writer = cache_kill.make_writer(tmp_path / "c")
    writer.open()
    writer.run(cache_kill.compute)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4000))  # less than a cache
    assert sum(writer.predicted().values()) > 4000
    cache_kill.make_writer(tmp_path / "c").open()


def test_disk_that_fills_up_in_the_middle(whole: tuple[Path, int], tmp_path: Path, monkeypatch) -> None:
    """Half way through a shard: it is named, nothing of it is left, and the cache goes on when there is space."""
    writer = cache_kill.make_writer(tmp_path / "c")
    writer.open(cache_kill.fill_tokenizer)

    def put(path: Path, data: bytes) -> None:
        if path.name == ".part-train-00000004.safetensors":
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        path.write_bytes(data)

    monkeypatch.setattr(files, "put", put)
    with pytest.raises(ValueError, match=r"train-00000004.safetensors cannot be written: No space left on device"):
        writer.run(cache_kill.compute)
    assert not list((tmp_path / "c").glob(".part-*")) and len(recorded(tmp_path / "c")) == 1
    monkeypatch.undo()
    killing.join(killing.start("cache_kill:write", str(tmp_path / "c")))
    assert contents(tmp_path / "c") == contents(whole[0])


def test_a_limit_of_the_system_on_a_file(tmp_path: Path) -> None:
    """The same from the kernel itself: the head is larger than a file may be."""
    writer = cache_kill.make_writer(tmp_path / "c")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(ValueError, match=r"head.safetensors cannot be written: File too large"):
            writer.open()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [f.name for f in (tmp_path / "c").iterdir()] == ["lock"]


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds 'chapter.txt' and is no cache; allowed: a new or empty folder"):
        cache_kill.make_writer(tmp_path / "thesis").open()
    with pytest.raises(ValueError, match=r"is a file; allowed: a folder"):
        cache_kill.make_writer(tmp_path / "thesis" / "chapter.txt").open()
    assert [f.name for f in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, spec: (s, Spec(**{**vars(spec), "dtype": "bfloat16"})), "dtype: 'float16' -> 'bfloat16'"),
        (lambda s, spec: (s, Spec(**{**vars(spec), "model": "n"})), "model: 'm' -> 'n'"),
        (lambda s, spec: ({**s, "train": s["train"].flip(0)}, spec), "train.data: "),
        (lambda s, spec: ({**s, "more": s["eval"]}, spec), "more.rows: None -> 3"),
    ],
)
def test_a_cache_with_other_settings_is_not_gone_on_with(whole, tmp_path: Path, change, message: str) -> None:
    shutil.copytree(whole[0], tmp_path / "c")
    splits, spec = change(cache_kill.make_splits(), cache_kill.SPEC)
    writer = CacheWriter(tmp_path / "c", splits, spec, head=cache_kill.make_head(), shard_rows=cache_kill.SHARD_ROWS)
    with pytest.raises(ValueError, match=r"begun with other settings: .*" + message):
        writer.open()
    assert contents(tmp_path / "c") == contents(whole[0])


def test_damaged_shards_are_made_again(whole: tuple[Path, int], tmp_path: Path) -> None:
    """One that was cut off always, one with a flipped bit when asked to look; the others stay."""
    shutil.copytree(whole[0], tmp_path / "c")
    cut, flipped = tmp_path / "c" / "train-00000004.safetensors", tmp_path / "c" / "train-00000008.safetensors"
    before = recorded(tmp_path / "c")
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    os.truncate(cut, 100)
    for repair, good in ((False, cut), (True, flipped)):
        writer = cache_kill.make_writer(tmp_path / "c")
        writer.open(repair=repair)
        writer.run(cache_kill.compute)
        assert good.read_bytes() == (whole[0] / good.name).read_bytes()
        assert (contents(tmp_path / "c") == contents(whole[0])) is repair
    untouched = {"train-00000000.safetensors", "eval-00000000.safetensors"}
    assert {name: v for name, v in before.items() if name in untouched}.items() <= recorded(tmp_path / "c").items()
    TeacherCache(tmp_path / "c").verify()


def test_hidden_states_beyond_the_dtype(tmp_path: Path) -> None:
    writer = cache_kill.make_writer(tmp_path / "c")
    writer.open()
    with pytest.raises(ValueError, match=r"do not fit float16 in rows 4-7 of train; allowed: dtype=bfloat16"):
        writer.run(lambda split, row, ids: {"hidden": torch.full((len(ids), 6, 8), 1e5 if row == 4 else 1.0)})
    assert len(recorded(tmp_path / "c")) == 1 and files.PART not in " ".join(contents(tmp_path / "c"))
