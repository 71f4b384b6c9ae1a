import pytest

from rbf_jax.data.files import replacing


def test_two_writers_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "folder" / "file"
    with replacing(path) as first:
        first.write(b"fir")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        first.write(b"st")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_writer_leaves_the_old_file(tmp_path):
    def fail(path):
        with replacing(path) as file:
            file.write(b"new")
            raise RuntimeError("disk on fire")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="disk on fire"):
        fail(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "folder" / "new"
    with pytest.raises(OSError, match=f"^folder {path.parent} cannot be made: Not a directory.$"):
        replacing(path).__enter__()


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / ("long" * 99)
    with pytest.raises(OSError, match=f"^{path} cannot be written: File name too long.$"):
        replacing(path).__enter__()
