"""A run's checkpoints: what is kept, what is newest, what goes wrong in the background."""

import threading

import numpy as np
import pytest

from hpc_absa.checkpoint import Content, Group, Store, file
from hpc_absa.errors import CheckpointError
from tests.checkpoint.contents import assert_same, content

UNWRITABLE = Content({}, {"model": Group({}, {"w": np.array([object()])})})


@pytest.fixture(name="folder")
def _folder(tmp_path):
    return tmp_path


def path(folder, step):
    return folder / f"step-{step:010d}-phase-001.h5"


def save(store, folder, *steps):
    for step in steps:
        store.save(path(folder, step), content(step))
    store.wait()


def steps(folder):
    return [int(p.name.split("-")[1]) for p in sorted(folder.glob("step-*"))]


def damage(folder, step):
    spoiled = bytearray(path(folder, step).read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    path(folder, step).write_bytes(spoiled)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_so_many_generations(folder, keep, background):
    save(Store(folder, keep, background=background), folder, 1, 2, 3, 4)
    assert steps(folder) == [1, 2, 3, 4][-keep:]


def test_newest_good(folder):
    store = Store(folder, 3)
    assert store.newest_good() is None
    save(store, folder, 9, 10, 100)
    loaded = store.newest_good()
    assert loaded.path == path(folder, 100)
    assert loaded.damaged == ()
    assert_same(loaded.content, content(100))


def test_a_folder_that_does_not_exist_holds_none(folder):
    assert Store(folder / "none", 2).newest_good() is None


def test_damaged_ones_are_passed_over_and_named(folder):
    save(Store(folder, 3), folder, 1, 2, 3)
    damage(folder, 3)
    path(folder, 2).write_bytes(b"")
    path(folder, 4).mkdir()
    loaded = Store(folder, 3).newest_good()
    assert loaded.path == path(folder, 1)
    assert_same(loaded.content, content(1))
    for step, named in zip((4, 3, 2), loaded.damaged, strict=True):
        assert str(path(folder, step)) in named


def test_all_damaged_is_an_error_that_names_each(folder):
    save(Store(folder, 2), folder, 1, 2)
    damage(folder, 1)
    damage(folder, 2)
    with pytest.raises(CheckpointError, match="no checkpoint is good") as caught:
        Store(folder, 2).newest_good()
    assert all(str(path(folder, step)) in str(caught.value) for step in (1, 2))


def test_half_written_files_are_not_seen_and_go_with_the_next_save(folder):
    (folder / f".{path(folder, 9).name}.123.tmp").write_bytes(b"half")
    store = Store(folder, 2)
    assert store.newest_good() is None
    save(store, folder, 1)
    assert [p.name for p in folder.iterdir()] == [path(folder, 1).name]


def test_nothing_goes_before_its_successor_is_verified(folder, monkeypatch):
    store = Store(folder, 2, background=False)
    save(store, folder, 1, 2)
    present = []

    def unverifiable(_):
        present.extend(steps(folder))
        raise CheckpointError("not what was written")

    monkeypatch.setattr(file, "verify", unverifiable)
    with pytest.raises(CheckpointError, match="not what was written"):
        store.save(path(folder, 3), content(3))
    assert present == [1, 2]
    assert steps(folder) == [1, 2]


def test_the_same_step_saved_again_replaces_it_only_when_good(folder, monkeypatch):
    store = Store(folder, 2, background=False)
    save(store, folder, 1)
    monkeypatch.setattr(file, "verify", lambda _: (_ for _ in ()).throw(CheckpointError("bad")))
    with pytest.raises(CheckpointError):
        store.save(path(folder, 1), content(1, weight=9.0))
    monkeypatch.undo()
    assert_same(store.newest_good().content, content(1))


def test_a_damaged_generation_does_not_count_as_one(folder):
    save(Store(folder, 2), folder, 1, 2)
    damage(folder, 2)
    store = Store(folder, 2)
    assert store.newest_good().path == path(folder, 1)
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
    assert store.newest_good().path == path(folder, 1)
    save(store, folder, 2, 3)
    assert steps(folder) == [2, 3, 5, 6, 7]
    assert Store(folder, 2).newest_good().path == path(folder, 3)


def test_what_cannot_be_removed_costs_no_run(folder):
    path(folder, 1).mkdir()
    store = Store(folder, 2)
    save(store, folder, 2, 3, 4)
    assert steps(folder) == [1, 3, 4]


# In the background


def test_the_training_goes_on_while_a_save_is_written(folder, monkeypatch):
    gate = threading.Event()
    write = file.write
    monkeypatch.setattr(file, "write", lambda *of: gate.wait(10) and write(*of))
    store = Store(folder, 2)
    store.save(path(folder, 1), content(1))
    assert steps(folder) == []
    gate.set()
    store.wait()
    assert steps(folder) == [1]


def test_at_most_one_save_is_in_flight(folder, monkeypatch):
    write, running, most = file.write, [], []

    def watched(*of):
        running.append(1)
        most.append(len(running))
        size = write(*of)
        running.pop()
        return size

    monkeypatch.setattr(file, "write", watched)
    save(Store(folder, 9), folder, 1, 2, 3)
    assert most == [1, 1, 1]


@pytest.mark.parametrize(
    "notice",
    [Store.wait, lambda store: store.save(store._folder / "step-2.h5", content(2))],
    ids=["wait", "save"],
)
def test_an_error_in_the_background_surfaces_once_at_the_next_call(folder, notice):
    store = Store(folder, 2)
    store.save(path(folder, 1), UNWRITABLE)
    with pytest.raises(CheckpointError, match=r"step-0000000001.*cannot be written"):
        notice(store)
    store.wait()
    save(store, folder, 3)
    assert steps(folder) == [3]


@pytest.mark.parametrize("background", [True, False])
def test_then_is_called_only_once_the_file_is_durable(folder, background, monkeypatch):
    synced = []
    sync = file._sync_folder
    monkeypatch.setattr(file, "_sync_folder", lambda of: (sync(of), synced.append(of)))
    told = []

    def then(published):
        assert synced == [folder]
        assert_same(file.read(published.path), content(1))
        told.append(published)

    store = Store(folder, 2, background=background)
    store.save(path(folder, 1), content(1), then)
    store.wait()
    (published,) = told
    assert published.bytes == path(folder, 1).stat().st_size
    assert published.seconds > 0


def test_then_is_not_called_for_what_failed(folder):
    store, told = Store(folder, 2), []
    store.save(path(folder, 1), UNWRITABLE, told.append)
    with pytest.raises(CheckpointError):
        store.wait()
    assert told == []
