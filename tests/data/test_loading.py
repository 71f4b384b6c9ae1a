import collections
import itertools
import json

import numpy as np
import pytest

from configs import base
from rbf_jax.data import load_data, load_tokenizer, loading, sources
from tests.harness.corpus import DOCUMENTS, VALID, config, segments

END = 256


def load(folder, *, seed=0, tokenizer_dir=None, **changes):
    return load_data(config(folder, **changes), seed=seed, tokenizer_dir=tokenizer_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(scope="module")
def data(folder):
    return load(folder)


def assert_equal(batches, others):
    for batch, other in itertools.zip_longest(batches, others):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def rows_of(batches, key="inputs"):
    """Returns the rows of batches, as tuples, padding rows left out."""
    return [
        tuple(row)
        for batch in batches
        for row, mask in zip(batch[key], batch["loss_mask"])
        if mask.any()
    ]


def test_shapes_and_dtypes(data):
    batch = next(iter(data.batches("train", 3, shuffle=True, repeat=True)))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "inputs": ((3, 32), "int32"),
        "targets": ((3, 32), "int32"),
        "positions": ((3, 32), "int32"),
        "segment_ids": ((3, 32), "int32"),
        "loss_mask": ((3, 32), "bool"),
    }


@pytest.mark.parametrize("shuffle", [False, True])
def test_packed_every_token_of_every_document_once(data, shuffle):
    pieces = collections.Counter()
    for batch in data.batches("train", 5, shuffle=shuffle, repeat=False):
        for inputs, targets, positions in segments(batch):
            np.testing.assert_array_equal(targets[:-1], inputs[1:])
            np.testing.assert_array_equal(positions, np.arange(len(inputs)))
            pieces[bytes(inputs.astype(np.uint8)), int(targets[-1])] += 1
    expected = collections.Counter()
    for text in DOCUMENTS:
        ids = [*text.encode(), END]
        for start in range(0, len(ids) - 1, 32):
            stop = min(start + 32, len(ids) - 1)
            expected[bytes(ids[start:stop]), ids[stop]] += 1
    assert pieces == expected


def test_packed_rows_are_nearly_full(data):
    assert data.num_targets["train"] / (data.num_rows("train") * 32) > 0.95


def test_padded_one_document_a_row(folder):
    data = load(folder, layout="padded")
    batches = list(data.batches("train", 7, shuffle=False, repeat=False))
    found = [segment for batch in batches for segment in segments(batch)]
    assert len(rows_of(batches)) == len(found) == data.num_rows("train") == len(DOCUMENTS)
    for (inputs, targets, positions), text in zip(found, DOCUMENTS):
        ids = [*text.encode(), END]
        np.testing.assert_array_equal(inputs, ids[:-1][:32])
        np.testing.assert_array_equal(targets, ids[1:][:32])
        np.testing.assert_array_equal(positions, np.arange(len(inputs)))


def test_bytes_per_token(data, folder):
    total = sum(len(text.encode()) for text in VALID)
    assert data.bytes_per_token["valid"] == 1.0
    assert data.num_targets["valid"] == total
    bpe = load(folder, tokenizer="bpe", layout="padded", context_length=4)
    targets = sum(len(bpe.tokenizer.encode(text)) for text in VALID)
    assert bpe.bytes_per_token["valid"] == total / targets
    assert bpe.bytes_per_token["train"] > 1.5


def test_one_epoch_is_filled_up_with_masked_rows(data):
    batches = list(data.batches("valid", 4, shuffle=False, repeat=False))
    assert data.num_rows("valid") < 4
    assert len(batches) == 1
    real = data.num_rows("valid")
    assert batches[0]["loss_mask"][:real].any(axis=1).all()
    assert not any(batches[0][key][real:].any() for key in batches[0])


def test_epochs_are_shuffled_differently_and_lose_nothing(data):
    count = data.num_rows("train")
    iterator = iter(data.batches("train", 1, shuffle=True, repeat=True))
    first, second = rows_of(take(iterator, count)), rows_of(take(iterator, count))
    assert first != second
    assert collections.Counter(first) == collections.Counter(second)
    in_order = rows_of(data.batches("train", 1, shuffle=False, repeat=False))
    assert collections.Counter(first) == collections.Counter(in_order)
    assert first != in_order


def test_the_seed_decides(data, folder):
    def first_rows(loaded):
        return rows_of(take(iter(loaded.batches("train", 8, shuffle=True, repeat=True)), 3))

    assert first_rows(load(folder)) == first_rows(data)
    assert first_rows(load(folder, seed=1)) != first_rows(data)


@pytest.mark.parametrize("repeat", [False, True])
def test_processes_share_the_batches_of_one(data, repeat):
    def batches(size, **process):
        all_of_them = data.batches("train", size, shuffle=True, repeat=repeat, **process)
        return list(itertools.islice(all_of_them, 20))

    # No multiple of 20 rows: the last batch is filled up, for all processes alike.
    assert data.num_rows("train") % 20 not in (0, 19)
    whole = batches(20)
    parts = [batches(5, process_index=index, process_count=4) for index in range(4)]
    assert len({len(part) for part in parts}) == 1
    together = [
        {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
        for step in zip(*parts)
    ]
    assert_equal(together, whole)
    assert repeat or len(whole) == -(-data.num_rows("train") // 20)


@pytest.mark.parametrize("done", [0, 1, 9, 60])
def test_state_goes_on_with_the_same_batches(data, done):
    def batches():
        # 60 batches are in the middle of a later epoch.
        return iter(data.batches("train", 4, shuffle=True, repeat=True))

    original = batches()
    take(original, done)
    state = json.loads(json.dumps(original.get_state()))
    expected = take(original, 12)
    again = batches()
    take(again, 3)
    again.set_state(state)
    assert_equal(take(again, 12), expected)


@pytest.mark.parametrize("start", [1, 9, 60])
def test_a_later_start_leaves_out_the_batches_before(data, start):
    def batches(size, **options):
        return iter(data.batches("train", size, shuffle=True, repeat=True, **options))

    expected = take(batches(4), start + 5)[start:]
    assert_equal(take(batches(4, start=start), 5), expected)
    # Another number of processes than before.
    halves = [
        take(batches(2, start=start, process_index=index, process_count=2), 5) for index in (0, 1)
    ]
    together = [
        {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
        for step in zip(*halves)
    ]
    assert_equal(together, expected)


def test_state_through_orbax(data, tmp_path):
    import grain
    import orbax.checkpoint as ocp

    def batches():
        return iter(data.batches("train", 4, shuffle=True, repeat=True))

    original = batches()
    take(original, 5)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(
            5,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave({"x": np.ones(3)}),
                data=grain.checkpoint.CheckpointSave(original),
            ),
        )
        manager.wait_until_finished()
        expected = take(original, 6)
        again = batches()
        manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(again)))
    assert_equal(take(again, 6), expected)


@pytest.mark.parametrize("repeat", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_workers_give_the_same_batches(data, folder, repeat):
    plain = iter(data.batches("train", 4, shuffle=True, repeat=repeat))
    expected = list(itertools.islice(plain, 30))
    with_workers = load(folder, num_workers=2)
    iterator = iter(with_workers.batches("train", 4, shuffle=True, repeat=repeat))
    assert_equal(take(iterator, 5), expected[:5])
    state = iterator.get_state()
    assert_equal(itertools.islice(iterator, 25), expected[5:])
    iterator.set_state(state)
    assert_equal(take(iterator, 5), expected[5:10])
    iterator.close()


def test_a_trained_tokenizer_stays_with_its_run(folder, tmp_path):
    run = tmp_path / "run"
    first = load(folder, tokenizer="bpe", tokenizer_dir=run)
    kept = load_tokenizer(run)
    assert kept.fingerprint == first.tokenizer.fingerprint
    # With other training text the run still goes on with its tokenizer.
    other = tmp_path / "other"
    other.mkdir()
    changed = config(other, tokenizer="bpe", train_files=(str(folder / "valid.txt"),))
    changed.valid_files = (str(folder / "train.txt"),)
    assert load_data(changed, seed=0, tokenizer_dir=run).tokenizer.fingerprint == kept.fingerprint
    assert load_data(changed, seed=0).tokenizer.fingerprint != kept.fingerprint


def test_a_run_keeps_the_tokenizer_that_it_began_with(folder, tmp_path):
    load(folder, tokenizer="bpe", tokenizer_dir=tmp_path)
    with pytest.raises(ValueError, match=r"data.tokenizer is 'bytes', but .* is another tokenizer"):
        load(folder, tokenizer_dir=tmp_path)


def test_a_tokenizer_by_path(folder, tmp_path):
    trained = load(folder, tokenizer="bpe").tokenizer
    path, run = tmp_path / "mine.json", tmp_path / "run"
    trained.save(path)
    named = {"tokenizer": str(path), "tokenizer_dir": run}
    assert load(folder, **named).tokenizer.fingerprint == trained.fingerprint
    load(folder, tokenizer="bpe", vocab_size=290).tokenizer.save(path)
    with pytest.raises(ValueError, match="is another tokenizer"):
        load(folder, **named)
    path.unlink()
    assert load(folder, **named).tokenizer.fingerprint == trained.fingerprint


def test_fingerprint_follows_text_and_tokenizer(data, folder, tmp_path):
    assert load(folder, layout="padded").fingerprint == data.fingerprint
    assert load(folder, tokenizer="bpe").fingerprint != data.fingerprint
    assert load(folder, valid_files=()).fingerprint != data.fingerprint


def test_embedded(tmp_path):
    data = load_data(config(tmp_path, source="embedded", train_files=(), valid_files=()), seed=0)
    batch = next(iter(data.batches("valid", 2, shuffle=False, repeat=False)))
    text = data.tokenizer.decode(batch["inputs"][0])
    assert text.isascii()
    assert data.num_targets["train"] > 4_500_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "tfrecords"}, r"data.source is 'tfrecords'; it must be one of embedded, text"),
        ({"source": "embedded"}, r"data.train_files is .*; data.source='embedded' has no use"),
        ({"manual_dir": "x"}, r"data.manual_dir is 'x'; data.source='text' has no use"),
        ({"layout": "pack"}, r"data.layout is 'pack'; it must be one of packed, padded"),
        (
            {"tokenizer": "gone.json"},
            r"data.tokenizer is 'gone.json'; it must be 'bytes', 'bpe' or",
        ),
        ({"tokenizer": "bpe", "vocab_size": 12}, r"data.vocab_size is 12; .* at least 257"),
        ({"context_length": 0}, r"data.context_length is 0; it must be an integer of at least 1"),
        ({"context_length": 2.5}, r"data.context_length is 2.5; it must be an integer"),
        ({"num_workers": -1}, r"data.num_workers is -1; it must be an integer of at least 0"),
        ({"vocab_size": 300}, r"data.vocab_size is 300; data.tokenizer='bytes' has no use for it"),
        ({"vocab_size": 300, "tokenizer": __file__}, r"vocab_size is 300; data.tokenizer='/.*no u"),
        ({"cache_dir": ""}, r"data.cache_dir is ''; it must name a folder"),
        ({"separator": "##"}, r"data.separator '##' is not in data.train_files"),
        ({"seed": -1}, r"seed is -1; it must be between 0 and"),
        ({"seed": 1 << 32}, r"seed is 4294967296; it must be between 0 and"),
    ],
)
def test_wrong_values(folder, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        load(folder, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["embedded", "tinystories", "tfds:dummy_texts"])
@pytest.mark.parametrize("separator", ["", "##"])
def test_a_separator_without_a_use(folder, source, separator):
    changes = {"source": source, "train_files": (), "valid_files": (), "separator": separator}
    with pytest.raises(ValueError, match=rf"data.separator is '{separator}'; .*={source!r} has no"):
        load(folder, **changes)


def test_defaults_are_those_of_the_schema():
    schema = base.data()
    assert schema.vocab_size == loading.DEFAULT_VOCAB_SIZE
    assert {key: schema[key] for key in sources.DEFAULTS} == sources.DEFAULTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"split is 'test'; it must be one of train, valid"),
        ({"batch_size": 0}, r"batch_size is 0; it must be at least 1"),
        ({"process_index": 2, "process_count": 2}, r"process_index is 2; .* process_count - 1 = 1"),
        ({"start": -1}, r"start is -1; it must be at least 0"),
        ({"process_count": 0}, r"process_index is 0; .* process_count - 1 = -1"),
    ],
)
def test_wrong_arguments(data, arguments, message):
    arguments = {"split": "train", "batch_size": 1, "shuffle": False, "repeat": False, **arguments}
    with pytest.raises(ValueError, match=message):
        data.batches(**arguments)


def test_empty_files(folder, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("\n<|endoftext|>\n \n")
    with pytest.raises(ValueError, match=r"data.source='text', split 'train': there is no text"):
        load(folder, train_files=str(path))


def test_broken_text_is_reported_through_bpe_training(folder, tmp_path):
    path = tmp_path / "broken.txt"
    path.write_bytes(b"a<|endoftext|>\xff")
    with pytest.raises(ValueError, match=r"broken.txt is not UTF-8"):
        load(folder, train_files=str(path), tokenizer="bpe")
