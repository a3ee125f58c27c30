"""A run's checkpoints: which are kept, which is restored, and what shards add."""

import os
import re

import pytest

from hpc_absa.checkpoint import CheckpointManager, Content, SavedPhase, file, restore, saved_phase
from hpc_absa.checkpoint.manager import assign_shards, shard_count, verify
from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import CheckpointError, CollectiveError, ExitStatus
from tests.checkpoint.contents import (
    ATTRIBUTES,
    assert_same,
    content,
    flip_bit,
    shards_of,
    split,
)


@pytest.fixture(name="folder")
def _folder(tmp_path):
    return tmp_path


def path(folder, step):
    return folder / f"step-{step:010d}-phase-001.h5"


def newest_good(manager):
    return restore.newest_good(manager, SerialCommunicator())


def save(manager, folder, *steps):
    for step in steps:
        manager.publish(path(folder, step), content(step))


def steps(folder):
    return [int(p.name.split("-")[1]) for p in sorted(folder.glob("step-*"))]


def damage(folder, step):
    flip_bit(path(folder, step), path(folder, step).stat().st_size // 2)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(folder, keep):
    save(CheckpointManager(folder, keep), folder, 1, 2, 3, 4)
    assert steps(folder) == [1, 2, 3, 4][-keep:]


def test_the_newest_is_restored(folder):
    manager = CheckpointManager(folder, 3)
    assert newest_good(manager) is None
    save(manager, folder, 9, 10, 100)
    loaded = newest_good(manager)
    assert loaded.path == path(folder, 100)
    assert loaded.damaged == ()
    assert_same(loaded.content, content(100))


def test_a_missing_folder_has_no_checkpoint(folder):
    assert newest_good(CheckpointManager(folder / "none", 2)) is None


def test_damaged_checkpoints_are_skipped_and_named(folder):
    save(CheckpointManager(folder, 3), folder, 1, 2, 3)
    damage(folder, 3)
    path(folder, 2).write_bytes(b"")
    path(folder, 4).mkdir()
    loaded = newest_good(CheckpointManager(folder, 3))
    assert loaded.path == path(folder, 1)
    assert_same(loaded.content, content(1))
    for step, named in zip((4, 3, 2), loaded.damaged, strict=True):
        assert str(path(folder, step)) in named


def test_a_copy_of_an_older_checkpoint_under_a_newer_name_is_skipped(folder):
    save(CheckpointManager(folder, 3), folder, 1, 2, 3)
    path(folder, 3).write_bytes(path(folder, 1).read_bytes())
    loaded = newest_good(CheckpointManager(folder, 3))
    assert loaded.path == path(folder, 2)
    assert "step 1, not the 3 in its name" in loaded.damaged[0]
    path(folder, 1).rename(folder / "kept.h5")
    assert_same(file.read(folder / "kept.h5"), content(1))


def test_if_all_are_damaged_the_error_names_each(folder):
    save(CheckpointManager(folder, 2), folder, 1, 2)
    damage(folder, 1)
    damage(folder, 2)
    with pytest.raises(CollectiveError, match="no checkpoint is good") as caught:
        newest_good(CheckpointManager(folder, 2))
    assert all(str(path(folder, step)) in str(caught.value) for step in (1, 2))


def test_unfinished_files_are_ignored_and_removed_by_the_next_save(folder):
    (folder / f".{path(folder, 9).name}.123.tmp").write_bytes(b"half")
    manager = CheckpointManager(folder, 2)
    assert newest_good(manager) is None
    save(manager, folder, 1)
    assert [p.name for p in folder.iterdir()] == [path(folder, 1).name]


def differs(*_):
    raise CheckpointError("what was read back is not what was written")


def test_nothing_is_removed_before_the_new_checkpoint_is_verified(folder, monkeypatch):
    manager = CheckpointManager(folder, 2)
    save(manager, folder, 1, 2)
    present = []

    def observed(*_):
        present.extend(steps(folder))
        differs()

    monkeypatch.setattr(file, "_compare", observed)
    with pytest.raises(CheckpointError, match="not what was written"):
        manager.publish(path(folder, 3), content(3))
    assert present == [1, 2]
    assert steps(folder) == [1, 2]


def test_a_second_save_of_a_step_replaces_the_first_only_once_verified(folder, monkeypatch):
    manager = CheckpointManager(folder, 2)
    save(manager, folder, 1)
    monkeypatch.setattr(file, "_compare", differs)
    with pytest.raises(CheckpointError, match="not what was written"):
        manager.publish(path(folder, 1), content(1, weight=9.0))
    monkeypatch.undo()
    assert_same(newest_good(manager).content, content(1))
    manager.publish(path(folder, 1), content(1, weight=9.0))
    assert_same(newest_good(manager).content, content(1, weight=9.0))


def test_a_damaged_checkpoint_does_not_count_among_those_to_keep(folder):
    save(CheckpointManager(folder, 2), folder, 1, 2)
    damage(folder, 2)
    manager = CheckpointManager(folder, 2)
    assert newest_good(manager).path == path(folder, 1)
    save(manager, folder, 3)
    assert steps(folder) == [1, 2, 3]
    save(manager, folder, 4)
    assert steps(folder) == [3, 4]


def test_a_save_after_damaged_newer_ones_is_kept(folder):
    """Resumed from step 1 while 5 to 7 are damaged: the saves that follow are older by name."""
    save(CheckpointManager(folder, 4), folder, 1, 5, 6, 7)
    for step in (5, 6, 7):
        damage(folder, step)
    manager = CheckpointManager(folder, 2)
    assert newest_good(manager).path == path(folder, 1)
    save(manager, folder, 2, 3)
    assert steps(folder) == [2, 3, 5, 6, 7]
    assert newest_good(CheckpointManager(folder, 2)).path == path(folder, 3)


def test_an_old_checkpoint_that_cannot_be_removed_is_no_error(folder):
    path(folder, 1).mkdir()
    manager = CheckpointManager(folder, 2)
    save(manager, folder, 2, 3, 4)
    assert steps(folder) == [1, 3, 4]


def test_publish_returns_once_file_and_folder_are_on_disk(folder, monkeypatch):
    synced, fsync = [], os.fsync

    def record(descriptor):
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", record)
    published = CheckpointManager(folder, 2).publish(path(folder, 1), content(1))
    *_, temporary, last = synced
    assert temporary.endswith(".tmp")
    assert last == str(folder)
    assert_same(file.read(published.path), content(1))
    assert published.bytes == path(folder, 1).stat().st_size
    assert published.seconds > 0


# Shards


def save_shards(manager, folder, step, save="0a", count=3):
    """The arrays of `content` in several shards, its attributes in the checkpoint itself."""
    bare, pieces = split(content(step), count)
    shards = [
        manager.write_shard(path(folder, step), save, number, count, piece)
        for number, piece in enumerate(pieces, 1)
    ]
    return manager.publish(path(folder, step), bare, tuple(shards))


@pytest.mark.parametrize(
    ("nbytes", "ranks", "count"),
    [(0, 4, 0), (199, 4, 0), (200, 4, 2), (399, 4, 3), (1000, 4, 4), (1000, 1, 0)],
)
def test_shard_count_follows_the_size_and_the_ranks(nbytes, ranks, count):
    assert shard_count(nbytes, ranks, shard_bytes=100) == count


def test_large_arrays_are_assigned_evenly_and_small_ones_to_no_shard():
    sizes = {"a": 5 << 16, "b": 4 << 16, "c": 3 << 16, "d": 3 << 16, "e": 1 << 16, "f": 100}
    keys = {("model", name): size for name, size in sizes.items()}
    shares = [[name for _, name in share] for share in assign_shards(keys, 2)]
    assert shares == [["a", "d"], ["b", "c", "e"]]


def test_a_checkpoint_with_shards_is_restored_as_a_whole(folder):
    published = save_shards(CheckpointManager(folder, 2), folder, 1)
    assert_same(newest_good(CheckpointManager(folder, 2)).content, content(1))
    assert len(shards_of(path(folder, 1))) == 3
    assert published.bytes == sum(file.stat().st_size for file in folder.iterdir())


def test_a_shard_under_the_name_of_a_checkpoint_is_refused(folder):
    manager = CheckpointManager(folder, 2)
    save_shards(manager, folder, 1)
    save_shards(manager, folder, 2)
    shards_of(path(folder, 2))[0].replace(path(folder, 2))
    loaded = newest_good(manager)
    assert loaded.path == path(folder, 1)
    assert "a shard under the name of a checkpoint" in loaded.damaged[0]


def test_shards_are_removed_with_their_checkpoint(folder):
    manager = CheckpointManager(folder, 2)
    for step in (1, 2, 3):
        save_shards(manager, folder, step)
    assert {p.name.split(".")[0] for p in folder.iterdir()} == {
        path(folder, step).stem for step in (2, 3)
    }
    assert_same(file.read(path(folder, 2)), content(2))


def test_shards_without_a_checkpoint_are_removed_by_the_next_save(folder):
    manager = CheckpointManager(folder, 2)
    save_shards(manager, folder, 1)
    _, pieces = split(content(2), 3)
    for number in (1, 2):  # killed here
        manager.write_shard(path(folder, 2), "ff", number, 3, pieces[number - 1])
    save_shards(manager, folder, 1, save="1b")
    save(manager, folder, 3)
    assert shards_of(path(folder, 2)) == []
    assert all(".1b." in p.name for p in shards_of(path(folder, 1)))
    assert_same(file.read(path(folder, 1)), content(1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shards: shards[1].unlink(), "missing"),
        (lambda shards: shards[1].write_bytes(b""), "not a checkpoint"),
        (lambda shards: (shards[1].unlink(), shards[1].mkdir()), "not a file"),
        (lambda shards: shards[1].write_bytes(shards[0].read_bytes()), "has digest"),
        (lambda shards: flip_bit(shards[1]), "do not match their checksum"),
        (lambda shards: shards[1].write_bytes(shards[1].read_bytes()[:-1]), "bytes, not the"),
    ],
    ids=["missing", "empty", "folder", "swapped", "flipped bit", "truncated"],
)
def test_a_damaged_shard_makes_only_its_checkpoint_damaged(folder, damage, message):
    manager = CheckpointManager(folder, 3)
    for step in (1, 2):
        save_shards(manager, folder, step)
    shards = shards_of(path(folder, 2))
    damage(shards)
    loaded = newest_good(CheckpointManager(folder, 3))
    assert loaded.path == path(folder, 1)
    assert str(shards[1]) in loaded.damaged[0]
    assert re.search(message, loaded.damaged[0])


def test_intact_shards_of_another_save_are_refused(folder):
    manager = CheckpointManager(folder, 3)
    save_shards(manager, folder, 1)
    save_shards(manager, folder, 2)
    for shard, other in zip(shards_of(path(folder, 2)), shards_of(path(folder, 1)), strict=True):
        shard.write_bytes(other.read_bytes())
    loaded = newest_good(manager)
    assert loaded.path == path(folder, 1)
    assert "its content has digest" in loaded.damaged[0]


# The user's files

USER_FILES = ["step-best.h5", "best.h5", "zzz.h5", "copy.shard", ".notes.tmp", "step-12.h5"]


def test_files_of_the_user_are_neither_restored_nor_removed(folder):
    for name in USER_FILES:
        (folder / name).write_text("user")
    manager = CheckpointManager(folder, 2)
    save(manager, folder, 1, 2, 3, 4)
    assert newest_good(manager).path == path(folder, 4)
    assert {p.name for p in folder.iterdir()} == {
        *USER_FILES,
        path(folder, 3).name,
        path(folder, 4).name,
    }


# The phase that continues from a checkpoint


def save_phase(folder, step, **attributes):
    whole = content(step)
    extended = Content({**whole.attributes, **attributes}, whole.groups)
    CheckpointManager(folder, 9).publish(path(folder, step), extended)


def test_the_newest_checkpoint_determines_the_next_phase(folder):
    assert saved_phase(folder) is None
    assert saved_phase(folder / "missing") is None
    save_phase(folder, 1, next_ranks=2, rank_limit=8)
    save_phase(folder, 2, next_ranks=4, rank_limit=8)
    assert saved_phase(folder) == SavedPhase(2, ATTRIBUTES["global_batch"], 4, 8)


def test_the_one_before_determines_it_if_the_newest_is_damaged(folder):
    for step in (1, 2, 3):
        save_phase(folder, step, next_ranks=step, rank_limit=8)
    damage(folder, 3)
    assert saved_phase(folder).next_ranks == 2
    path(folder, 2).write_bytes(path(folder, 1).read_bytes())
    assert saved_phase(folder).next_ranks == 1
    damage(folder, 1)
    damage(folder, 2)
    assert saved_phase(folder) is None


def test_a_checkpoint_of_an_earlier_version_determines_no_ranks(folder):
    save(CheckpointManager(folder, 2), folder, 1)
    assert saved_phase(folder) == SavedPhase(1, ATTRIBUTES["global_batch"], None, None)


def test_files_of_the_user_do_not_determine_the_next_phase(folder):
    save_phase(folder, 1, next_ranks=2, rank_limit=8)
    for name in USER_FILES:
        (folder / name).write_bytes(path(folder, 1).read_bytes())
    path(folder, 1).unlink()
    assert saved_phase(folder) is None


# Verification


def test_verify_names_each_damaged_checkpoint_of_a_folder(folder):
    save(CheckpointManager(folder, 3), folder, 1, 2, 3)
    damage(folder, 2)
    path(folder, 3).write_bytes(path(folder, 1).read_bytes())
    one, two, three = verify(folder)
    assert (one.exit_status, one.error) == (ExitStatus.OK, None)
    assert two.exit_status == three.exit_status == ExitStatus.FAILED
    assert two.error.startswith("damaged: bytes 512 to ")
    assert "step 1, not the 3 in its name" in three.error


def test_verify_tells_what_is_not_a_checkpoint_from_damage(folder):
    (folder / "notes.txt").write_text("text")
    for of, message in ((folder, "no checkpoint in this folder"), (folder / "notes.txt", "not a")):
        (result,) = verify(of)
        assert result.exit_status == ExitStatus.USAGE
        assert message in result.error
