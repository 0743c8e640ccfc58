import hashlib
import io
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="the demo's extras are not installed")

import numpy as np

from flatkern.demo import DemoError, data

LABELS = np.array([0, 1] * 300)


def test_splits_are_disjoint_balanced_and_cover_everything() -> None:
    splits = data.split(LABELS, test=100, validation=200)
    every = np.concatenate([splits.test, splits.validation, splits.pool])
    assert sorted(every) == list(range(len(LABELS)))
    assert LABELS[splits.test].sum() == 50
    assert LABELS[splits.validation].sum() == 100


def test_splits_and_training_sets_follow_their_seed_alone() -> None:
    np.random.seed(1)
    first = data.split(LABELS, 100, 200)
    before = data.draw_training_set(LABELS, first.pool, 64, 0.3, seed=0)
    np.random.seed(2)
    second = data.split(LABELS, 100, 200)
    after = data.draw_training_set(LABELS, second.pool, 64, 0.3, seed=0)
    assert np.array_equal(first.test, second.test)
    assert all(map(np.array_equal, before, after))
    other, _ = data.draw_training_set(LABELS, first.pool, 64, 0.3, seed=1)
    assert not np.array_equal(before[0], other)


def test_training_sentences_come_from_the_pool_and_do_not_depend_on_the_flips() -> None:
    splits = data.split(LABELS, 100, 200)
    rows, given = data.draw_training_set(LABELS, splits.pool, 64, 0.0, seed=3)
    flipped_rows, flipped = data.draw_training_set(LABELS, splits.pool, 64, 0.3, seed=3)
    assert set(rows) <= set(splits.pool)
    assert np.array_equal(rows, flipped_rows)
    assert np.array_equal(given, LABELS[rows])
    assert (flipped != given).sum() == 19


@pytest.mark.parametrize(("share", "wrong"), [(0.0, 0), (0.3, 77), (1.0, 256)])
def test_exactly_that_many_labels_are_flipped(share: float, wrong: int) -> None:
    labels = np.array([0, 1] * 128)
    given = data.flip(labels, share, np.random.default_rng(0))
    assert (given != labels).sum() == wrong
    assert set(given) <= {0, 1}
    assert labels.sum() == 128, "the true labels were written to"


def test_more_than_there_is_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="count: 1000 asked for, but class 0 has 300 rows"):
        data.balanced(LABELS, 1000, np.random.default_rng(0))


def test_the_order_of_an_epoch_is_a_permutation_of_its_own() -> None:
    first, second = (data.epoch_order(64, seed=0, epoch=epoch) for epoch in (1, 2))
    assert sorted(first) == list(range(64))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, data.epoch_order(64, seed=0, epoch=1))


def test_sentences_are_read_with_the_sign_of_their_score(tmp_path: Path) -> None:
    path = tmp_path / "scores.txt"
    path.write_bytes(b"1\t2.5\tgood &amp; fine\r\n2\t-0.1\tbad\r\n3\t0\tneither\r\n4\t1.0\tbad\r\n")
    sentences = data.read_sentences(path)
    assert sentences.texts == ["good & fine", "bad"], "neutral or repeated text was kept"
    assert sentences.labels.tolist() == [1, 0]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The index serves these bytes; counts as offline if they are empty."""
    content = b"archive"
    monkeypatch.setattr(data, "_download", lambda path: path.write_bytes(content))
    return content


def test_a_verified_archive_is_kept_and_not_fetched_again(
    tmp_path: Path, served: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = hashlib.sha256(served).hexdigest()
    path = data.fetch_archive(tmp_path, sha256)
    assert path.read_bytes() == served
    monkeypatch.setattr(data, "_download", lambda _: pytest.fail("fetched again"))
    assert data.fetch_archive(tmp_path, sha256) == path
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("served")
def test_a_wrong_hash_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="expected 5d7c06e0"):
        data.fetch_archive(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cached_archive_is_replaced(tmp_path: Path, served: bytes) -> None:
    (tmp_path / data.ARCHIVE).write_bytes(b"damaged")
    path = data.fetch_archive(tmp_path, hashlib.sha256(served).hexdigest())
    assert path.read_bytes() == served


def test_offline_the_error_says_which_file_goes_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(path: Path) -> None:
        path.write_bytes(b"half of")
        raise ConnectionError("no route to //user:secret@index/simple")

    monkeypatch.setattr(data, "_download", offline)
    with pytest.raises(DemoError) as caught:
        data.fetch_archive(tmp_path)
    for part in (data.ARCHIVE, data.SHA256, str(tmp_path / data.ARCHIVE), "no route"):
        assert part in str(caught.value)
    assert "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../outside.txt", "inside/../../outside.txt"])
def test_a_member_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "bad.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(DemoError, match=r"bad\.tar\.gz is refused"):
        data.unpack(archive, folder)
    assert not (tmp_path / "outside.txt").exists()


def test_what_is_not_an_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "text.tar.gz"
    archive.write_bytes(b"no archive")
    with pytest.raises(DemoError, match=r"text\.tar\.gz is refused"):
        data.unpack(archive, tmp_path)
