"""A run's checkpoints: what is kept, what is newest, what goes wrong in the background."""

import re

import pytest

from hpc_absa.checkpoint import Store, file
from hpc_absa.checkpoint.shards import of
from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import CheckpointError, CollectiveError
from hpc_absa.training import resuming
from tests.checkpoint.contents import assert_same, content, split


@pytest.fixture(name="folder")
def _folder(tmp_path):
    return tmp_path


def path(folder, step):
    return folder / f"step-{step:010d}-phase-001.h5"


def newest_good(store):
    return resuming.newest_good(store, SerialCommunicator())


def save(store, folder, *steps):
    for step in steps:
        store.publish(path(folder, step), content(step))


def steps(folder):
    return [int(p.name.split("-")[1]) for p in sorted(folder.glob("step-*"))]


def damage(folder, step):
    spoiled = bytearray(path(folder, step).read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    path(folder, step).write_bytes(spoiled)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_so_many_generations(folder, keep):
    save(Store(folder, keep), folder, 1, 2, 3, 4)
    assert steps(folder) == [1, 2, 3, 4][-keep:]


def test_newest_good(folder):
    store = Store(folder, 3)
    assert newest_good(store) is None
    save(store, folder, 9, 10, 100)
    loaded = newest_good(store)
    assert loaded.path == path(folder, 100)
    assert loaded.damaged == ()
    assert_same(loaded.content, content(100))


def test_a_folder_that_does_not_exist_holds_none(folder):
    assert newest_good(Store(folder / "none", 2)) is None


def test_damaged_ones_are_passed_over_and_named(folder):
    save(Store(folder, 3), folder, 1, 2, 3)
    damage(folder, 3)
    path(folder, 2).write_bytes(b"")
    path(folder, 4).mkdir()
    loaded = newest_good(Store(folder, 3))
    assert loaded.path == path(folder, 1)
    assert_same(loaded.content, content(1))
    for step, named in zip((4, 3, 2), loaded.damaged, strict=True):
        assert str(path(folder, step)) in named


def test_another_generation_under_a_newer_name_is_passed_over(folder):
    save(Store(folder, 3), folder, 1, 2, 3)
    path(folder, 3).write_bytes(path(folder, 1).read_bytes())
    loaded = newest_good(Store(folder, 3))
    assert loaded.path == path(folder, 2)
    assert "step 1, not the 3 in its name" in loaded.damaged[0]
    path(folder, 1).rename(folder / "kept.h5")
    assert_same(file.read(folder / "kept.h5"), content(1))


def test_all_damaged_is_an_error_that_names_each(folder):
    save(Store(folder, 2), folder, 1, 2)
    damage(folder, 1)
    damage(folder, 2)
    with pytest.raises(CollectiveError, match="no checkpoint is good") as caught:
        newest_good(Store(folder, 2))
    assert all(str(path(folder, step)) in str(caught.value) for step in (1, 2))


def test_half_written_files_are_not_seen_and_go_with_the_next_save(folder):
    (folder / f".{path(folder, 9).name}.123.tmp").write_bytes(b"half")
    store = Store(folder, 2)
    assert newest_good(store) is None
    save(store, folder, 1)
    assert [p.name for p in folder.iterdir()] == [path(folder, 1).name]


def test_nothing_goes_before_its_successor_is_verified(folder, monkeypatch):
    store = Store(folder, 2)
    save(store, folder, 1, 2)
    present = []

    def unverifiable(*_):
        present.extend(steps(folder))
        raise CheckpointError("not what was written")

    monkeypatch.setattr(file, "_compare", unverifiable)
    with pytest.raises(CheckpointError, match="not what was written"):
        store.publish(path(folder, 3), content(3))
    assert present == [1, 2]
    assert steps(folder) == [1, 2]


def test_the_same_step_saved_again_replaces_it_only_when_good(folder, monkeypatch):
    store = Store(folder, 2)
    save(store, folder, 1)
    monkeypatch.setattr(file, "_compare", lambda *_: (_ for _ in ()).throw(CheckpointError("bad")))
    with pytest.raises(CheckpointError):
        store.publish(path(folder, 1), content(1, weight=9.0))
    monkeypatch.undo()
    assert_same(newest_good(store).content, content(1))


def test_a_damaged_generation_does_not_count_as_one(folder):
    save(Store(folder, 2), folder, 1, 2)
    damage(folder, 2)
    store = Store(folder, 2)
    assert newest_good(store).path == path(folder, 1)
    save(store, folder, 3)
    assert steps(folder) == [1, 2, 3]
    save(store, folder, 4)
    assert steps(folder) == [3, 4]


def test_a_save_older_than_damaged_ones_survives_them(folder):
    """Resumed from step 1 while 5 to 7 are damaged: the saves that follow are older by name."""
    save(Store(folder, 4), folder, 1, 5, 6, 7)
    for step in (5, 6, 7):
        damage(folder, step)
    store = Store(folder, 2)
    assert newest_good(store).path == path(folder, 1)
    save(store, folder, 2, 3)
    assert steps(folder) == [2, 3, 5, 6, 7]
    assert newest_good(Store(folder, 2)).path == path(folder, 3)


def test_what_cannot_be_removed_costs_no_run(folder):
    path(folder, 1).mkdir()
    store = Store(folder, 2)
    save(store, folder, 2, 3, 4)
    assert steps(folder) == [1, 3, 4]


def test_published_only_once_the_file_is_durable(folder, monkeypatch):
    synced = []
    sync = file._sync
    monkeypatch.setattr(file, "_sync", lambda of: (sync(of), synced.append(of)))
    published = Store(folder, 2).publish(path(folder, 1), content(1))
    assert synced[-1] == folder
    assert_same(file.read(published.path), content(1))
    assert published.bytes == path(folder, 1).stat().st_size
    assert published.seconds > 0


# In shards


def save_shards(store, folder, step, save="0a", count=3):
    """The arrays of `content` over several shards, its attributes in the checkpoint itself."""
    whole, bare, pieces = split(content(step), count)
    parts = [
        store.write_shard(path(folder, step), save, number, count, piece)
        for number, piece in enumerate(pieces, 1)
    ]
    store.publish(path(folder, step), bare, tuple(parts))
    return whole


def test_a_checkpoint_in_shards_reads_as_one(folder):
    whole = save_shards(Store(folder, 2), folder, 1)
    assert_same(newest_good(Store(folder, 2)).content, whole)
    assert len(of(path(folder, 1))) == 3


def test_a_shard_under_a_checkpoint_s_name_is_none(folder):
    store = Store(folder, 2)
    save_shards(store, folder, 1)
    save_shards(store, folder, 2)
    of(path(folder, 2))[0].replace(path(folder, 2))
    loaded = newest_good(store)
    assert loaded.path == path(folder, 1)
    assert "a shard, under the name of a whole one" in loaded.damaged[0]


def test_shards_go_with_their_checkpoint_and_not_before(folder):
    store = Store(folder, 2)
    for step in (1, 2, 3):
        save_shards(store, folder, step)
    assert {p.name.split(".")[0] for p in folder.iterdir()} == {
        path(folder, step).stem for step in (2, 3)
    }
    assert_same(file.read(path(folder, 2)), content(2))


def test_shards_without_a_checkpoint_go_with_the_next_save(folder):
    store = Store(folder, 2)
    save_shards(store, folder, 1)
    _, _, pieces = split(content(2), 3)
    for number in (1, 2):  # killed here
        store.write_shard(path(folder, 2), "ff", number, 3, pieces[number - 1])
    save_shards(store, folder, 1, save="1b")
    save(store, folder, 3)
    assert of(path(folder, 2)) == []
    assert all(".1b." in p.name for p in of(path(folder, 1)))
    assert_same(file.read(path(folder, 1)), content(1))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda shards: shards[1].unlink(), "missing"),
        (lambda shards: shards[1].write_bytes(b""), "not a checkpoint"),
        (lambda shards: (shards[1].unlink(), shards[1].mkdir()), "not a file"),
        (lambda shards: shards[1].write_bytes(shards[0].read_bytes()), "has digest"),
        (lambda shards: flip(shards[1]), "do not match their checksum"),
        (lambda shards: shards[1].write_bytes(shards[1].read_bytes()[:-1]), "bytes, not the"),
    ],
    ids=["missing", "empty", "folder", "swapped", "flipped bit", "truncated"],
)
def test_a_damaged_shard_spoils_its_checkpoint_alone(folder, spoil, words):
    store = Store(folder, 3)
    for step in (1, 2):
        save_shards(store, folder, step)
    shards = of(path(folder, 2))
    spoil(shards)
    loaded = newest_good(Store(folder, 3))
    assert loaded.path == path(folder, 1)
    assert str(shards[1]) in loaded.damaged[0]
    assert re.search(words, loaded.damaged[0])


def test_a_shard_of_another_save_is_not_taken_for_this_one_s(folder):
    store = Store(folder, 3)
    save_shards(store, folder, 1)
    save_shards(store, folder, 2)
    for mine, other in zip(of(path(folder, 2)), of(path(folder, 1)), strict=True):
        mine.write_bytes(other.read_bytes())
    assert newest_good(store).path == path(folder, 1)


def flip(path):
    spoiled = bytearray(path.read_bytes())
    spoiled[-1] ^= 1
    path.write_bytes(spoiled)


def test_files_of_the_user_s_are_neither_resumed_from_nor_removed(folder):
    mine = ["step-best.h5", "best.h5", "zzz.h5", "copy.shard", ".notes.tmp", "step-12.h5"]
    for name in mine:
        (folder / name).write_text("mine")
    store = Store(folder, 2)
    save(store, folder, 1, 2, 3, 4)
    assert newest_good(store).path == path(folder, 4)
    assert {p.name for p in folder.iterdir()} == {*mine, path(folder, 3).name, path(folder, 4).name}
