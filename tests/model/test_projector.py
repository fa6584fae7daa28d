"""The projector: groups of five frames that never cross a clip."""

import torch

from midasheng import frames
from midasheng.model.projector import AudioProjector

LENGTHS = [3_040, 4_000, 16_000, 33_333, 161_280]  # audio samples; most leave frames over


def test_tokens_of_a_clip_do_not_depend_on_its_neighbours():
    projector = AudioProjector(8, 12)
    clip_frames = [frames.frames(n) for n in LENGTHS]
    assert any(n % frames.STACK for n in clip_frames)
    clips = [torch.randn(n, 8) for n in clip_frames]
    with torch.no_grad():
        together = projector(torch.cat(clips), clip_frames)
        alone = [projector(clip, [len(clip)]) for clip in clips]
    assert [len(tokens) for tokens in alone] == [frames.audio_tokens(n) for n in LENGTHS]
    assert (together - torch.cat(alone)).abs().max() < 1e-6


def test_five_frames_are_stacked_in_time_order():
    projector = AudioProjector(2, 10)
    projector.net = torch.nn.Sequential()  # what would be projected
    frames_FE = torch.arange(22.0).view(11, 2)
    assert torch.equal(projector(frames_FE, [11]), torch.arange(20.0).view(2, 10))  # frame 11 fills no group


def test_names_and_layers_of_the_release():
    projector = AudioProjector(8, 12)
    state = {n: tuple(p.shape) for n, p in projector.state_dict().items()}
    assert state == {"net.0.weight": (12, 40), "net.0.bias": (12,), "net.2.weight": (12, 12), "net.2.bias": (12,)}
    stacked = torch.randn(1, 40)
    by_hand = projector.net[2](torch.nn.functional.gelu(projector.net[0](stacked)))
    assert torch.equal(projector(stacked.view(5, 8), [5]), by_hand)
