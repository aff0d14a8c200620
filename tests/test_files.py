"""files.py and tables.py: a file is old or new and never half; a table's record never says more than is on the disk, whoever is killed.

Kills are real: of forked processes, by SIGKILL, at every moment at which the disk is asked to keep something.
"""
import errno
import fcntl
import itertools
import multiprocessing
import os
import resource
import signal
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

import files
import tables
from files import atomic_file
from tables import Table, fill
from refusals import refusal

COLUMNS = dict(a=((2, 3), np.float32), b=((), np.uint8))                 # of a table with 11 rows
FORK = multiprocessing.get_context("fork")


def forked(*functions):
    """Run functions in processes of their own, at once -> their exit statuses, -9 of one that was killed."""
    start = FORK.Barrier(len(functions))
    processes = [FORK.Process(target=lambda function=function: (start.wait(), function())) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def values(rows):
    """What the rows (n,) of the table are."""
    rows = np.asarray(rows)
    return [np.broadcast_to(rows[:, None, None] + 0.5, (len(rows), 2, 3)).astype(np.float32), (rows + 1).astype(np.uint8)]


def filled(cache, rows=11, computed=None, batch=2, columns=COLUMNS, before=lambda rows: None, **options):
    """The arrays of the table, filled; `computed`, a list, takes the rows that were missing; before: called with each batch."""
    def compute(missing):
        for start in range(0, len(missing), batch):
            part = missing[start:start + batch]
            before(part)
            yield part, values(part)
            if computed is not None:
                computed.extend(part.tolist())
    with Table("table", dict(of="numbers"), rows, columns, cache) as table:
        fill(table, compute, "counting", **options)
        return table.arrays()


def folder(cache):
    found, = Path(cache).glob("table-*")
    return found


def claimed(cache):
    """The rows that the record says are there, if there is one."""
    record = folder(cache) / "crc32.npy" if list(Path(cache).glob("table-*")) else None
    return np.flatnonzero(np.frombuffer(record.read_bytes()[128:], np.uint32)) if record and record.exists() else np.array([], int)


def assert_right(arrays, rows=11):
    for array, expected in zip(arrays, values(np.arange(rows)), strict=True):
        assert array.dtype == expected.dtype and np.array_equal(array, expected)


def assert_claims_are_true(cache):
    """Every row that the record claims is in the files."""
    rows = claimed(cache)
    for key, expected in zip(COLUMNS, values(rows)):
        assert not len(rows) or np.array_equal(np.load(folder(cache) / f"{key}.npy")[rows], expected)


@pytest.fixture
def every_batch(monkeypatch):
    """Each batch is recorded."""
    monkeypatch.setattr(tables, "SECONDS", 0)


# A table

def test_a_table_is_what_was_computed_mapped_and_not_writable(tmp_path):
    arrays = filled(tmp_path)
    assert_right(arrays)
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in arrays)
    assert_right([np.load(folder(tmp_path) / f"{key}.npy") for key in COLUMNS])      # as anyone reads them


def test_a_second_start_computes_nothing_and_more_rows_are_added(tmp_path):
    filled(tmp_path)
    assert_right(filled(tmp_path, computed=(computed := [])))
    assert computed == []
    arrays = filled(tmp_path, 200, computed)
    assert_right(arrays, 200)
    assert computed == list(range(11, 200)) and len(np.load(folder(tmp_path) / "a.npy")) == 200
    assert_right(filled(tmp_path, 5, computed), 5)       # a smaller number takes the first
    assert len(computed) == 189 and len(claimed(tmp_path)) == 200


def test_what_tells_tables_apart_gives_folders_of_their_own(tmp_path):
    for about, columns in ((1, COLUMNS), (2, COLUMNS), (1, {"a": COLUMNS["a"]}), (1, {**COLUMNS, "b": ((), np.int8)})):
        with Table("table", dict(x=about), 3, columns, tmp_path) as table:
            assert table.missing().tolist() == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_whole_table_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    filled(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)          # which root never sees by itself
    monkeypatch.setattr(os, "pwrite", None)
    assert_right(filled(tmp_path, computed=(computed := [])))
    assert computed == []
    with Table("table", dict(of="numbers"), 11, COLUMNS, tmp_path) as table:
        assert not any(column.file.writable() for column in (table.record, *table.columns))


def test_an_error_keeps_what_was_computed_before_it(tmp_path):
    def stop(rows):
        if 6 in rows:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, before=stop)
    assert_right(filled(tmp_path, computed=(computed := [])))
    assert computed == [6, 7, 8, 9, 10]


# Kills

def killed_at(moment, after, call):
    """A call in which the process kills itself before or after the moment-th time that it waits for the disk."""
    count, fsync = itertools.count(), os.fsync

    def counted(file):
        here = next(count) == moment
        if here and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = counted
    call()


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_moment_leaves_true_claims_and_the_next_start_a_whole_table(tmp_path, every_batch, after):
    claims = []
    for moment in itertools.count():
        cache = tmp_path / str(moment)
        status, = forked(lambda: killed_at(moment, after, lambda: filled(cache)))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert_claims_are_true(cache)
        claims.append(len(claimed(cache)))
        assert_right(filled(cache, computed=(computed := [])))
        assert len(computed) == 11 - claims[-1]
        assert not list(cache.rglob("*.tmp")) or moment == 0             # of meta.json, on whose flush it was killed
    assert moment >= 6 * 3 and set(claims) >= {0, 2, 4, 6, 8, 10, 11}


def test_a_start_that_is_killed_again_and_again_ends(tmp_path, every_batch):
    done, starts = 0, 0
    while done < 11:
        forked(lambda: killed_at(5, False, lambda: filled(tmp_path)))    # each start records one batch, and then another half
        assert_claims_are_true(tmp_path)
        assert len(claimed(tmp_path)) >= done
        done, starts = len(claimed(tmp_path)), starts + 1
    assert 2 < starts < 12
    assert_right(filled(tmp_path))


def test_a_kill_while_rows_are_added_keeps_the_old_ones(tmp_path, every_batch):
    for moment in range(9):
        cache = tmp_path / str(moment)
        filled(cache, 5)
        assert forked(lambda: killed_at(moment, moment % 2, lambda: filled(cache))) == [-signal.SIGKILL]
        assert_claims_are_true(cache)
        assert_right(filled(cache, computed=(computed := [])))
        assert set(computed) <= set(range(5, 11))


def test_nothing_is_claimed_that_a_power_cut_would_take(tmp_path, every_batch, monkeypatch):
    """Of the columns only what a flush waited for is safe; the record may come to the disk at any time."""
    safe, fsync = {}, os.fsync

    def seen(file):
        here = {path.stat().st_ino: path for path in tmp_path.rglob("*.npy")}
        path = here.get(os.fstat(file).st_ino)
        rows = claimed(tmp_path)
        for (key, (shape, dtype)), expected in zip(COLUMNS.items(), values(rows)):
            assert not len(rows) or np.array_equal(np.frombuffer(safe[key], dtype).reshape(-1, *shape)[rows], expected)
        fsync(file)
        if path:
            safe[path.stem] = path.read_bytes()[128:]
    monkeypatch.setattr(os, "fsync", seen)
    assert_right(filled(tmp_path))
    assert set(safe) == {"a", "b", "crc32"}


# Damage

def overwrite(path, content, place):
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(content)


DAMAGES = {                            # what is done to the folder, and the rows that are computed again
    "a file is deleted": (lambda folder: (folder / "a.npy").unlink(), range(11)),
    "another is deleted": (lambda folder: (folder / "b.npy").unlink(), range(11)),
    "the record is deleted": (lambda folder: (folder / "crc32.npy").unlink(), range(11)),
    "the description is deleted": (lambda folder: (folder / "meta.json").unlink(), range(11)),
    "a file is empty": (lambda folder: os.truncate(folder / "a.npy", 0), range(11)),
    "a file ends in its header": (lambda folder: os.truncate(folder / "a.npy", 50), range(11)),
    "a file ends in a row": (lambda folder: os.truncate(folder / "a.npy", 128 + 24 * 6 + 5), range(6, 11)),
    "the record is cut off": (lambda folder: os.truncate(folder / "crc32.npy", 128 + 4 * 4), range(4, 11)),
    "the record is damaged": (lambda folder: overwrite(folder / "crc32.npy", b"\7\7\7\7", 128 + 4 * 3), [3]),
    "a row is damaged": (lambda folder: overwrite(folder / "a.npy", b"\7", 128 + 24 * 5 + 23), [5]),
    "the last row of another is damaged": (lambda folder: overwrite(folder / "b.npy", b"\7", 128 + 10), [10]),
    "the description is of something else": (lambda folder: (folder / "meta.json").write_text('{"of": "others"}'), range(11)),
    "the description is damaged": (lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe{"), range(11)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_deleted_cut_off_or_replaced_is_computed_again(tmp_path, damage):
    change, again = DAMAGES[damage]
    filled(tmp_path)
    change(folder(tmp_path))
    assert_right(filled(tmp_path, computed=(computed := [])))
    assert computed == list(again)
    filled(tmp_path, computed=(computed := []))
    assert computed == []


def limited(size, call):
    """A call in a process whose files can have `size` bytes at most: as on a disk that is full."""
    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        refusal(call, "cannot write", "a.npy", "480 bytes are needed", "make room", kind=OSError)
    assert forked(run) == [0]


def test_a_full_disk_is_an_error_that_names_the_file_before_anything_is_computed(tmp_path):
    filled(tmp_path, 10)
    limited(128 + 24 * 20, lambda: filled(tmp_path, 30, before=os.abort))            # 20 rows more: 480 bytes
    assert np.load(folder(tmp_path) / "a.npy").shape == (10, 2, 3)                   # as it was
    assert_right(filled(tmp_path, 10, computed=(computed := [])), 10)
    assert computed == []


# Several at once

@pytest.mark.parametrize("locks", [True, False])
def test_independent_starts_at_once_on_one_cache_all_end_with_the_whole_table(tmp_path, every_batch, monkeypatch, locks):
    def refused(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    if not locks:                                        # as on some network disks
        monkeypatch.setattr(fcntl, "flock", refused)
    for trial in range(6):
        cache = tmp_path / str(trial)
        assert forked(*[lambda: assert_right(filled(cache))] * 4) == [0] * 4
        assert_right(filled(cache, computed=(computed := [])))
        assert computed == []


def test_independent_starts_of_which_one_is_killed_and_one_wants_more_do_not_disturb_each_other(tmp_path, every_batch):
    for trial in range(8):
        cache = tmp_path / str(trial)
        statuses = forked(lambda: assert_right(filled(cache)), lambda: killed_at(trial, False, lambda: filled(cache)),
                          lambda: assert_right(filled(cache, 40), 40))
        assert statuses in ([0, -signal.SIGKILL, 0], [0, 0, 0])          # where others were faster, there was nothing left to do
        assert_claims_are_true(cache)
        assert_right(filled(cache, 40, computed=(computed := [])), 40)
        assert computed == []


def together(world, meeting, call):
    """Run call(rank) in `world` processes of one group, as torchrun does -> their exit statuses."""
    def run(rank):
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        dist.barrier()                                   # none leaves before all have met
        call(rank)
        dist.destroy_process_group()
    return forked(*(lambda rank=rank: run(rank) for rank in range(world)))


def test_processes_share_the_rows_and_another_number_of_them_goes_on(tmp_path, every_batch):
    cache, log = tmp_path / "cache", tmp_path / "log"
    log.touch()

    def start(world, meeting, killed=None):
        def noted(rank, rows):
            if rank == killed and 40 in rows:
                os.kill(os.getpid(), signal.SIGKILL)
            with open(log, "a") as file:
                file.write("".join(f"{row}\n" for row in rows))
        def late(rank):
            time.sleep(0.2 * rank)                       # by now the first could have begun
            assert_right(filled(cache, 60, before=lambda rows: noted(rank, rows)), 60)
        return together(world, tmp_path / meeting, late)
    first = start(2, "first", killed=1)
    assert first[1] == -signal.SIGKILL and first[0] != 0                 # torchrun ends those who wait for one that died
    assert_claims_are_true(cache)
    assert len(claimed(cache)) == 40
    assert start(3, "second") == [0] * 3
    rows = [int(line) for line in log.read_text().split()]
    assert sorted(rows) == list(range(60))               # each was computed once
    assert_right(filled(cache, 60, computed=(computed := [])), 60)
    assert computed == []


def test_processes_with_caches_of_their_own_are_refused(tmp_path):
    assert together(2, tmp_path / "meeting", lambda rank: refusal(
        lambda: filled(tmp_path / str(rank)), "not complete", "--cache DIR")) == [0, 0]


def test_a_table_that_one_process_fills_alone_waits_for_no_other(tmp_path):
    def alone(rank):
        if rank == 0:
            assert_right(filled(tmp_path, computed=(computed := []), shared=False))
            assert len(computed) == 11
    assert together(2, tmp_path / "meeting", alone) == [0, 0]


# Files

def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_error_while_writing_leaves_the_old_file_whole(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "file") as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_complete(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with atomic_file(tmp_path / "file") as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "file").read_bytes() == b"old"
    assert (tmp_path / "file").read_bytes() == b"new" and names(tmp_path) == ["file"]


def test_two_may_write_one_file_at_once_and_the_last_ones_is_there(tmp_path):
    with atomic_file(tmp_path / "file") as one:
        one.write(b"one, longer")
        with atomic_file(tmp_path / "file") as other:
            other.write(b"other")
        assert (tmp_path / "file").read_bytes() == b"other"
    assert (tmp_path / "file").read_bytes() == b"one, longer" and names(tmp_path) == ["file"]


def test_a_file_has_the_mode_that_the_user_gives_files_or_keeps_its_own(tmp_path):
    def mode():
        with atomic_file(tmp_path / "file") as file:
            file.write(b"content")
        return stat.S_IMODE((tmp_path / "file").stat().st_mode)
    old = os.umask(0o027)
    try:
        assert mode() == 0o640
        (tmp_path / "file").chmod(0o604)
        assert mode() == 0o604
    finally:
        os.umask(old)


def test_leftovers_of_a_kill_are_removed_but_not_what_is_being_written(tmp_path):
    def write_and_die(content):
        with atomic_file(tmp_path / "dead") as file:
            file.write(content)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    with atomic_file(tmp_path / "living") as living:
        living.write(b"half")
        living.flush()
        forked(lambda: write_and_die(b"half"))
        forked(lambda: write_and_die(b""))
        (tmp_path / ".mine.0123abcd.tmp").write_bytes(b"a user's")
        assert len(names(tmp_path)) == 4
        files.remove_leftovers.cache_clear()             # as another process
        with atomic_file(tmp_path / "next") as file:
            file.write(b"whole")
        assert [name for name in names(tmp_path) if name.startswith(".living.")]
        assert not [name for name in names(tmp_path) if name.startswith(".dead.")]
    assert names(tmp_path) == [".mine.0123abcd.tmp", "living", "next"]
