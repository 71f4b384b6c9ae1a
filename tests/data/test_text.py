import codecs
import gzip
import lzma

import pytest

from rbf_jax.data import text
from tests.harness.corpus import DOCUMENTS, VALID, write


def documents(source, split="train"):
    return list(source.documents(split))


@pytest.fixture
def plain(tmp_path):
    return tmp_path / write(tmp_path / "plain.txt", DOCUMENTS)


@pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".xz", lzma)])
def test_compressed_files_hold_the_same(plain, suffix, module):
    packed = plain.with_suffix(f".txt{suffix}")
    packed.write_bytes(module.compress(plain.read_bytes()))
    valid = write(plain.with_name("valid.txt"), VALID)
    source = text.TextSource(str(packed), (valid,), "<|endoftext|>")
    assert documents(source) == DOCUMENTS
    assert documents(source, "valid") == VALID


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
def test_blocks_of_any_size_give_the_same(plain, monkeypatch, block):
    monkeypatch.setattr(text, "_BLOCK", block)
    expected = plain.read_bytes().decode().split("<|endoftext|>")
    assert list(text.split_file(plain, "<|endoftext|>")) == expected


def test_separators_that_overlap(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_BLOCK", 1)
    path = tmp_path / "a.txt"
    path.write_text("xaaaya")
    assert list(text.split_file(path, "aa")) == ["x", "aya"]


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_a_byte_order_mark_is_no_text(plain, monkeypatch, block):
    monkeypatch.setattr(text, "_BLOCK", block)
    plain.write_bytes(codecs.BOM_UTF8 + "one|\ufefftwo".encode())
    assert list(text.split_file(plain, "|")) == ["one", "\ufefftwo"]


def test_without_validation_files_the_last_documents_are_held_out(plain):
    source = text.TextSource((str(plain),), (), "<|endoftext|>")
    assert documents(source) == DOCUMENTS[:114]
    assert documents(source, "valid") == DOCUMENTS[114:]


def test_patterns_and_one_document_a_file(tmp_path):
    for number in (2, 0, 1):
        (tmp_path / f"part{number}.txt").write_text(f"  document {number}\n")
    source = text.TextSource(str(tmp_path / "part*.txt"), (), "")
    assert documents(source) == ["document 0", "document 1"]
    assert documents(source, "valid") == ["document 2"]


def test_blank_documents_are_left_out(tmp_path):
    path = write(tmp_path / "a.txt", ["a", " \n", "", "b", "c"])
    assert documents(text.TextSource(path, (), "<|endoftext|>")) == ["a", "b"]


def test_fingerprint_follows_content_and_separator(plain):
    def fingerprint(separator="<|endoftext|>"):
        return text.TextSource(str(plain), (), separator).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint("\n") != first
    with plain.open("a") as file:
        file.write("more")
    assert fingerprint() != first


def test_fingerprint_follows_the_border_between_splits(tmp_path):
    a, b, c = (write(tmp_path / f"{name}.txt", [name, name]) for name in "abc")
    first = text.TextSource((a, b), (c,), "<|endoftext|>").fingerprint
    assert text.TextSource((a,), (b, c), "<|endoftext|>").fingerprint != first


def test_not_utf8(plain, monkeypatch):
    # The broken byte is in the second block, after one character cut by the border.
    monkeypatch.setattr(text, "_BLOCK", 8)
    plain.write_bytes("abcdefé".encode() + b"xyz\xff<|endoftext|>")
    source = text.TextSource(
        str(plain), (str(write(plain.with_name("v.txt"), VALID)),), "<|endoftext|>"
    )
    with pytest.raises(ValueError, match=r"plain.txt is not UTF-8: invalid start byte at byte 11"):
        documents(source)


def test_cut_inside_a_character(plain):
    plain.write_bytes("<|endoftext|>☃".encode()[:-1])
    source = text.TextSource(
        str(plain), (str(write(plain.with_name("v.txt"), VALID)),), "<|endoftext|>"
    )
    with pytest.raises(
        ValueError, match=r"plain.txt is not UTF-8: unexpected end of data at byte 13"
    ):
        documents(source)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("how", ["cut", "other"])
def test_damaged_files(tmp_path, suffix, how):
    module = {".gz": gzip, ".xz": lzma}[suffix]
    path = tmp_path / f"some{suffix}"
    content = module.compress(b"text<|endoftext|>" * 1000)
    path.write_bytes(content[: len(content) // 2] if how == "cut" else b"plain text")
    source = text.TextSource(str(path), (), "<|endoftext|>")
    with pytest.raises(ValueError, match=rf"some{suffix} is damaged or not a {suffix} file"):
        documents(source)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_separator_that_is_nowhere(plain, split):
    other = write(plain.with_name("other.txt"), VALID, separator="####")
    files = (plain, other) if split == "valid" else (other, plain)
    source = text.TextSource(str(files[0]), str(files[1]), "<|endoftext|>")
    with pytest.raises(
        ValueError, match=rf"'<\|endoftext\|>' is not in data.{split}_files .*other"
    ):
        documents(source, split)


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        ((), (), r"data.train_files is empty"),
        (("nothing*.txt",), (), r"data.train_files: no file matches '.*nothing\*.txt'"),
        (("plain.txt",), ("gone.txt",), r"data.valid_files: no file matches '.*gone.txt'"),
        (("plain.txt", "words.csv"), (), r"words.csv must be a file whose name ends in .txt, .gz"),
        (("*.txt",), ("plain.txt",), r"plain.txt is in both data.train_files and data.valid_files"),
    ],
)
def test_wrong_files(plain, train, valid, message):
    plain.with_name("words.csv").touch()
    folder = plain.parent
    with pytest.raises(ValueError, match=message):
        text.TextSource([f"{folder}/{t}" for t in train], [f"{folder}/{v}" for v in valid], "x")


def test_a_link_to_a_training_file_is_no_validation_file(plain):
    link = plain.with_name("link.txt")
    link.symlink_to(plain)
    with pytest.raises(ValueError, match=r"link.txt is in both"):
        text.TextSource(str(plain), str(link), "x")


def test_one_document_cannot_be_divided(tmp_path):
    path = write(tmp_path / "one.txt", ["alone"])
    with pytest.raises(ValueError, match="holds 1 documents"):
        documents(text.TextSource(path, (), "<|endoftext|>"))
