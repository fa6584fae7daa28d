"""Packs hold their samples end to end, with a tail that trains nothing; keyed randomness does not change."""

import numpy as np
import pytest
import torch

from midasheng.sample import NO_TARGET, Sample, counter_seed, pack, unit_hash


def sample(key: str, ids: list[int], labels: list[int], clips: tuple[int, ...] = ()) -> Sample:
    is_audio = np.array([i < 0 for i in ids])
    waves = tuple(np.full(n, n, dtype=np.float32) for n in clips)
    return Sample("corpus", key, "task", np.abs(np.array(ids)), np.array(labels), is_audio, waves)


ONE = sample("one", [5, -9, -9, 6], [NO_TARGET, NO_TARGET, 6, NO_TARGET], (3,))
TWO = sample("two", [7, 8, 9], [8, 9, NO_TARGET], (2, 4))


def test_contents():
    p = pack([ONE, TWO], 10, pad_id=1)
    assert p.ids_T.tolist() == [5, 9, 9, 6, 7, 8, 9, 1, 1, 1]
    assert p.labels_T.tolist() == [-100, -100, 6, -100, 8, 9, -100, -100, -100, -100]
    assert p.position_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert p.is_audio_T.nonzero().flatten().tolist() == [1, 2]
    assert p.audio_L.tolist() == [3, 3, 3, 2, 2, 4, 4, 4, 4]
    assert (p.segments, p.clips, p.keys, p.corpora) == ((4, 3, 3), (3, 2, 4), ("one", "two"), ("corpus", "corpus"))
    assert p.targets == (1, 2)  # also of a segment whose first slot has one
    assert (p.target_N.tolist(), p.audio_K.tolist()) == ([2, 4, 5], [1, 2])
    assert p.segment_bounds.tolist() == [0, 4, 7, 10]
    assert p.segment_bounds.dtype == p.chunk_bounds.dtype == torch.int32
    assert p.ids_T.dtype == p.labels_T.dtype == p.position_T.dtype == torch.int64
    assert p.audio_L.dtype == torch.float32


def test_a_fixed_number_of_frames_is_filled_with_chunks_of_their_own():
    long = sample("long", [5], [6], (640 * 260, 16_000))
    assert pack([long], 2, 1).chunks == (252, 8, 25)
    p = pack([long], 2, 1, None, 600)
    assert p.chunks == (252, 8, 25, 252, 63)
    assert p.chunk_bounds.tolist() == [0, 252, 260, 285, 537, 600]
    assert pack([long], 2, 1, None, 285).chunks == (252, 8, 25)
    assert pack([], 2, 1, None, 300).chunks == (252, 48)
    with pytest.raises(AssertionError, match="285 frames in a pack of 284"):
        pack([long], 2, 1, None, 284)


def test_full_pack_has_no_tail():
    assert pack([ONE, TWO], 7, pad_id=1).segments == (4, 3)


def test_pack_without_samples_is_all_tail():
    p = pack([], 4, pad_id=1)
    assert (p.segments, p.clips, p.keys, p.targets, len(p.audio_L)) == ((4,), (), (), (), 0)
    assert p.ids_T.tolist() == [1] * 4


def test_overfull_pack_is_refused():
    with pytest.raises(AssertionError, match="7 slots planned into a pack of 6"):
        pack([ONE, TWO], 6, pad_id=1)


def test_to_moves_every_tensor():
    p = pack([ONE], 5, pad_id=1)
    moved = p.to("meta")
    tensors = {k for k, v in vars(p).items() if isinstance(v, torch.Tensor)}
    assert tensors == {
        "ids_T", "labels_T", "position_T", "is_audio_T", "audio_L", "target_N", "audio_K", "segment_bounds", "chunk_bounds"
    }  # fmt: skip
    assert all(getattr(moved, k).is_meta for k in tensors)
    assert all(getattr(moved, k) == v for k, v in vars(p).items() if k not in tensors)


def test_keyed_randomness_is_the_same_everywhere():
    """Written-down values: a run begun on one machine goes on on another."""
    assert counter_seed(0, "order", "x", 1) == 5980323465005453054
    assert unit_hash("held_out:a") == pytest.approx(0.4836099668914306)
    assert counter_seed(1, 23) != counter_seed(12, 3)
