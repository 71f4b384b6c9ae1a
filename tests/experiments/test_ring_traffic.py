"""The bytes that ring attention sends, on the devices that there are."""

import json

import pytest

from experiments import ring_traffic

LAYER = ring_traffic.Layer(heads=4, kv_heads=2, head_dim=8, dtype="float32")


@pytest.mark.parametrize("causal", [True, False])
def test_program_sends_what_the_algorithm_says(causal):
    """But for the block that two devices exchange in both passes, which XLA exchanges once."""
    length, devices = 256, 2
    forward, both = LAYER.predicted(length, devices, causal)
    rows = length // devices * LAYER.heads * 4 if causal else 0  # nobody asks for the logsumexp
    block = length // devices * LAYER.kv_heads * (2 * LAYER.head_dim + 1) * 4  # k, v and norms
    found = ring_traffic.compiled_bytes(LAYER, length, devices, causal)
    assert found == (forward - rows, both - block)


PROGRAM = """\
%body (p: (s32[], f32[2,3])) -> (s32[], f32[2,3]) {
  %sent = f32[2,3]{1,0} collective-permute(%x), channel_id=1
}

%condition (p: (s32[], f32[2,3])) -> pred[] {
}

ENTRY %main (a: f32[2,3]) -> f32[2,3] {
  %first = bf16[5]{0} collective-permute-start(%a), channel_id=2
  %loop = (s32[], f32[2,3]) while(%t), condition=%condition, body=%body, backend_config={TRIPS}
}
"""


def test_turns_of_loops_count():
    known = PROGRAM.replace("TRIPS", '{"known_trip_count":{"n":"7"}}')
    assert ring_traffic.bytes_sent(known) == 7 * 24 + 10
    with pytest.raises(ValueError, match="number of turns is not known"):
        ring_traffic.bytes_sent(PROGRAM)
    with pytest.raises(ValueError, match="all-gather"):
        ring_traffic.bytes_sent(known.replace("collective-permute-start", "all-gather"))


def test_hidden():
    forward, backward = ring_traffic.Layer().hidden_above(400e12, 450e9)
    # 16-bit keys and values, a norm for each key; and two float32 gradients.
    assert forward == pytest.approx(400e12 / 450e9 * (4 * 128 + 4) / (2 * 128))
    assert backward == pytest.approx(forward * (12 * 128 + 4) / (4 * 128 + 4) / 2.5)


def test_norms_are_less_to_send_than_to_make_again():
    norms = ring_traffic.Layer().norms(8, causal=True)
    assert norms["share_of_block"] == pytest.approx(1 / 129)
    assert norms["sent_bytes"] == 7 * 4
    assert norms["made_memory_bytes"] == 8 * 2 * (128 * 2 + 4)
    assert norms["made_flops"] == 8 * 2 * 2 * 128


def test_table_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ring_traffic, "Layer", lambda: LAYER)
    monkeypatch.setattr(ring_traffic, "compiled_bytes", lambda *_: (1, 2))
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    out = tmp_path / "traffic.json"
    assert ring_traffic.main(["", "--lengths=64", "--devices=4,8", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert [row["devices"] for row in found["rows"]] == [4, 8, 4, 8]
    assert set(found["causal_key_norms"]) == {"4", "8"}
    assert "| causal | 64 | 8 |" in capsys.readouterr().out
