"""Packs hold their samples end to end, with a tail that trains nothing; keyed randomness does not change."""

from dataclasses import replace

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


NONE = NO_TARGET
RUN = [
    sample("a0", [5, 6, -9, -9, 7, 8, 1], [NONE] * 5 + [1, NONE], (3,)),
    replace(sample("a1", [5, 6, -9, -9, 7, 4, 2, 2], [NONE] * 5 + [2, 2, NONE]), common=5),
]
SINGLE = sample("b", [5, 6, -9, 3], [NONE, NONE, 3, NONE], (2,))
TEXTS = [
    sample("c0", [5, 6, 4, 4, 3], [NONE] * 3 + [3, NONE]),
    replace(sample("c1", [5, 6, 4, 5], [NONE] * 3 + [5]), common=3),
]


def test_a_row_whose_samples_share_slots():
    p = pack([*RUN, SINGLE, *TEXTS], 20, 1, None, 0, 2)
    leaves = [[8, 1], [4, 2, 2], [9, 3], [4, 3], [5]]
    behind = [[9, 9, 7], [4], [5, 6], [1] * 4]  # two trunks, the lead, the dummy
    assert [part.tolist() for part in p.ids_T.split(p.segments)] == leaves + behind
    assert p.segments == (2, 3, 2, 2, 1, 3, 1, 2, 4)
    assert p.parents == (5, 5, 7, 6, 6, 7, 7, -1, -1)
    assert (p.shared, p.real) == (3, p.segments[:8])
    starts = [5, 5, 2, 3, 3, 2, 2, 0, 0]
    assert p.position_T.tolist() == [b + i for b, n in zip(starts, p.segments, strict=True) for i in range(n)]
    # the clip of the run comes before that of the single sample, whose slot comes before
    assert (p.audio_K.tolist(), p.clips, p.audio_L.tolist()) == ([10, 11, 5], (3, 2), [3, 3, 3, 2, 2])
    assert p.labels_T.tolist() == [1, NONE, 2, 2, NONE, 3, NONE, 3, NONE, 5] + [NONE] * 10
    assert p.target_N.tolist() == [0, 2, 3, 5, 7, 9]
    assert (p.keys, p.targets) == (("a0", "a1", "b", "c0", "c1"), (1, 2, 1, 1, 1))
    lead, trunk = [14, 15], [10, 11, 12]
    assert p.seen_A[:14].tolist() == [*lead, *trunk, 0, 1, *lead, *trunk, 2, 3]
    assert p.seen_bounds.tolist() == [0, 7, 15, 19, 24, 28, 33, 36, 38, 42]
    assert (p.seen_A.dtype, p.seen_bounds.dtype) == (torch.int64, torch.int32)
    assert (p.to("meta").seen_A.is_meta, len(p.seen_A)) == (True, 42)


def test_what_is_shared_costs_its_slots_once():
    """A run that shares no more than all do has no trunk; without samples nobody shares the lead."""
    texts = [TEXTS[0], replace(TEXTS[1], common=2)]
    p = pack([*texts, SINGLE], 10, 1, None, 0, 2)
    assert (p.segments, p.parents, p.shared) == ((3, 2, 2, 2, 1), (3, 3, 3, -1, -1), 1)
    p = pack(RUN, 10, 1)
    assert (p.segments, p.parents, p.shared) == ((2, 3, 5), (2, 2, -1), 1)
    p = pack([], 4, 1, None, 0, 2)
    assert (p.segments, p.parents, p.shared, len(p.seen_A)) == ((4,), (-1,), 0, 0)
    assert pack([SINGLE], 4, 1, None, 0, 2).parents == (1, -1)


@pytest.mark.parametrize(
    ("samples", "lead", "words"),
    [
        ([RUN[1]], 0, "a1 shares 5 slots with none before"),
        ([RUN[0], replace(RUN[1], ids=RUN[1].ids + 1)], 0, "a1 and a0 differ in their first 5 slots"),
        ([RUN[0], replace(RUN[1], is_audio=RUN[1].ids == 5)], 0, "a1 and a0 differ in their first 5 slots"),
        ([*RUN, replace(RUN[1], key="a2", common=4)], 0, "a2 shares 4 slots, its run 5"),
        ([RUN[0], replace(RUN[1], clips=RUN[0].clips)], 0, "a1 shares 5 slots and has audio of its own"),
        ([RUN[0], replace(RUN[1], common=3)], 0, "a1 shares 3 slots and has audio of its own"),
        ([RUN[0], replace(RUN[1], labels=RUN[1].labels * 0)], 0, "a1 has a target among 5 shared slots"),
        ([replace(RUN[0], labels=RUN[0].labels * 0), RUN[1]], 0, "a0 has a target among 5 shared slots"),
        ([replace(TEXTS[0], ids=TEXTS[0].ids[:3]), TEXTS[1]], 0, "c0: 3 shared slots, 3 in all"),
        (TEXTS, 4, "c0: a run shares 3 slots, all samples share 4"),
        ([SINGLE, TWO], 2, "two and b differ in their first 2 slots|two has a target among 2"),
        ([SINGLE], 3, "b has a target among 3|b has audio among the 3"),
    ],
)  # fmt: skip
def test_samples_that_do_not_share_what_they_say_are_refused(samples, lead, words):
    with pytest.raises(AssertionError, match=words):
        pack(samples, 40, 1, None, 0, lead)


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
        "ids_T", "labels_T", "position_T", "is_audio_T", "audio_L", "target_N", "audio_K", "segment_bounds", "chunk_bounds",
        "seen_A", "seen_bounds",
    }  # fmt: skip
    assert all(getattr(moved, k).is_meta for k in tensors)
    assert all(getattr(moved, k) == v for k, v in vars(p).items() if k not in tensors)


def test_keyed_randomness_is_the_same_everywhere():
    """Written-down values: a run begun on one machine goes on on another."""
    assert counter_seed(0, "order", "x", 1) == 5980323465005453054
    assert unit_hash("held_out:a") == pytest.approx(0.4836099668914306)
    assert counter_seed(1, 23) != counter_seed(12, 3)
