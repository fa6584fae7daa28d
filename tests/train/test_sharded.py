"""FSDP2: what lies on each rank, 8-bit states of shards, and files that any number of ranks reads."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from midasheng import config
from midasheng.config import ConfigError, Hardware
from midasheng.model import adapt
from midasheng.model.audio_lm import AudioLM
from midasheng.model.encoder import EncoderShape
from midasheng.train import optim, shard_files, sharded
from midasheng.train.adam8bit import BLOCK, CODES, SCALES, ShardedAdamW8bit, local, quantised, values
from tests.conftest import CONFIGS

ENCODER, DECODER = "weights.encoder=e.pt", "weights.decoder=d"


@pytest.fixture(scope="module")
def eighty() -> Iterator[None]:
    """The first of 80 ranks whose collectives do nothing. Once: torch keeps meshes beyond the end of their group."""
    torch.distributed.init_process_group("fake", rank=0, world_size=80, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def alone(monkeypatch) -> None:
    """Whatever group there is."""
    for room in (sharded, shard_files):
        monkeypatch.setattr(room, "here", lambda: (0, 1))


def stage(name: str, scale: str, *settings: str) -> config.Stage:
    return config.load(CONFIGS / f"{name}.yaml", scale, [ENCODER, DECODER, *settings], CONFIGS).stage


# -- eighty ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [8, 80])
@pytest.mark.parametrize("scale", ["3b", "7b"])
def test_the_forecast_is_what_80_ranks_hold(eighty, scale, share):
    """10 nodes of 8: what FSDP2 and the optimizer really keep on the fullest rank, against the arithmetic of `make
    forecast`; the tensors have no content."""
    footprint = pytest.importorskip("midasheng.train.footprint")  # of make forecast
    asked = stage("stage1_align", scale)
    lm = footprint.shaped(asked)
    total = sum(p.numel() for p in lm.parameters())
    sharded.shard(lm, "cpu", share)
    blocks = len(lm.audio_encoder.blocks) + len(lm.decoder.model.layers)
    assert len(sharded.groups(lm)) == 1 + 3 * blocks  # each with its two norms
    parameters = dict(lm.named_parameters())
    assert all(isinstance(p, DTensor) for p in parameters.values())
    adam = optim.optimizer(parameters.items(), asked.optim)
    assert isinstance(adam, ShardedAdamW8bit)
    weights, states, tables = 0, 0, {}
    for g, group in enumerate(adam.param_groups):
        for k, p in enumerate(group["params"]):
            weights += local(p).nbytes
            adam.init_state(group, p, g, k)
            states += sum(t.nbytes for key, t in adam.state[p].items() if key in (*CODES, *SCALES))
            tables |= {key: t.nbytes for key, t in adam.state[p].items() if key.startswith("qmap")}
            first, last = sharded.cut(p)
            assert last - first == local(p).numel()
            if p.ndim > 1:  # blocks of 8-bit states are the whole tensor's
                assert all(
                    sharded.rows(p.shape[0], share, r)[0] * (p.numel() // p.shape[0]) % BLOCK == 0 for r in range(share)
                )
    expected = footprint.shard_bytes(footprint.shaped(asked), "adamw8bit", share)
    assert weights == expected.weights == expected.gradients  # both float32
    assert states + sum(tables.values()) == expected.optimizer
    assert 4 * total / share <= weights < 1.02 * 4 * total / share


@pytest.mark.parametrize("parts", [1, 3, 8, 80])
def test_rows_are_those_of_chunk(parts):
    for n in (1, 64, 80, 1280, 1901, 152_064):
        chunks = [len(c) for c in torch.arange(n).chunk(parts)]
        ours = [sharded.rows(n, parts, part) for part in range(parts)]
        assert [b - a for a, b in ours if b > a] == chunks
        assert ours[-1][1] == n


def test_which_strategy():
    with torch.device("meta"):
        small, large = nn.Linear(4, 4), nn.Linear(2**15, 2**15, bias=False)
    node = Hardware(devices=8)
    assert sharded.chosen(Hardware(devices=1), large) == ""
    assert sharded.chosen(node, small) == "ddp"
    assert sharded.chosen(node, large) == "fsdp"
    large.weight.requires_grad_(False)  # a stage of LoRA
    assert sharded.chosen(node, large) == "ddp"
    assert sharded.chosen(Hardware(devices=1, strategy="fsdp"), small) == "fsdp"
    with pytest.raises(ConfigError, match="3 does not divide 8 processes"):
        sharded.chosen(Hardware(devices=8, strategy="fsdp", shard=3), small)
    with pytest.raises(ConfigError, match="under FSDP2 were never run"):
        sharded.chosen(Hardware(devices=8, strategy="fsdp", compile=True), small)


def test_ddp_is_told_nothing_of_what_is_frozen():
    asked = stage("stage2_pretrain", "3b", "model.decoder.fields.num_hidden_layers=1")
    with torch.device("meta"):
        lm = AudioLM(EncoderShape(64, 1, 2), asked.model.decoder.architecture, asked.model.decoder.fields)
    adapt.freeze_all_but(lm, asked.train)
    adapt.add_lora(lm, adapt.LoraPlan(tuple(asked.lora.targets), 8, 32.0, 0.1), 0)
    sharded.leave_out_frozen(lm)
    ignored = set(lm._ddp_params_and_buffers_to_ignore)
    assert ignored == {n for n, p in lm.named_parameters() if not p.requires_grad} | {n for n, _ in lm.named_buffers()}
    assert "decoder.model.embed_tokens.weight" in ignored
    assert not any("lora_" in n for n in ignored)


# -- 8-bit states in pieces -------------------------------------------------------------------------------------------


def trained(steps: int = 3) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """A tensor of 64 rows of 96 (24 blocks of 256) and one of 80, three steps on."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(64, 96)), nn.Parameter(torch.randn(80))]
    adam = optim.optimizer([("a", weights[0]), ("b", weights[1])], config.Optim())
    for _ in range(steps):
        for p in weights:
            p.grad = torch.randn_like(p)
        adam.step()
    return weights, adam


def in_pieces(cuts: list[int]) -> tuple[shard_files.Saved, dict[str, torch.Tensor]]:
    """8-bit states of the tensor above as ranks would have saved them that were cut at these elements, each from a run
    of its own: blocks begin at the cut."""
    weights, adam = trained()
    state = adam.state[weights[0]]
    pieces = []
    for start, stop in pairwise(cuts):
        kept = {"weight": weights[0].detach().flatten()[start:stop]}
        for number, (codes, scales) in enumerate(zip(CODES, SCALES, strict=True)):
            table = state[f"qmap{number + 1}"]
            flat = values(state[codes], state[scales], table)[start:stop]
            aligned = all(c % BLOCK == 0 for c in cuts[:-1])
            if aligned:
                blocks = slice(start // BLOCK, -(-stop // BLOCK))
                kept |= {codes: state[codes].flatten()[start:stop], scales: state[scales][blocks]}
            else:
                kept |= dict(zip((codes, scales), quantised(flat, table), strict=True))
        pieces.append(shard_files.Piece(start, stop, shard_files._slicer(kept)))
    return shard_files.Saved("here", {"a": pieces}, {"a": 3}), state


@pytest.mark.parametrize("cuts", [[0, 6144], [0, 1536, 3072, 4608, 6144], [0, 2304, 6144]])
def test_8_bit_states_cut_at_blocks_come_back_bit_for_bit(cuts):
    """On any number of ranks whose own cuts are at blocks too."""
    saved, state = in_pieces(cuts)
    for own in ([0, 6144], [0, 3072, 6144], [0, 2048, 4096, 6144]):
        for number, (codes, scales) in enumerate(zip(CODES, SCALES, strict=True)):
            parts = [saved.eight_bit("a", number, a, b, state[f"qmap{number + 1}"]) for a, b in pairwise(own)]
            assert torch.equal(torch.cat([p[0] for p in parts]), state[codes].flatten())
            assert torch.equal(torch.cat([p[1] for p in parts]), state[scales])


@pytest.mark.parametrize(
    ("cuts", "own"), [([0, 2112, 4224, 6144], [0, 6144]), ([0, 6144], [0, 2112, 4224, 6144]), ([0, 6144], [2112, 4224])]
)
def test_8_bit_states_cut_elsewhere_are_quantised_once_more(cuts, own):
    """What they stand for changes by less than a step of the codes, wherever the blocks begin."""
    saved, state = in_pieces(cuts)
    for number, (codes, scales) in enumerate(zip(CODES, SCALES, strict=True)):
        table = state[f"qmap{number + 1}"]
        whole = values(state[codes], state[scales], table)
        for a, b in pairwise(own):
            found = values(*saved.eight_bit("a", number, a, b, table), table)
            assert len(found) == b - a
            assert (found - whole[a:b]).norm() < 0.04 * whole[a:b].norm()
            if number == 1:
                assert (found >= 0).all()


def test_whether_states_are_8_bit_is_decided_by_the_whole_tensor(eighty):
    """A shard of 60 elements of 4,800 is 8-bit, a whole tensor of 4,000 is not; as bitsandbytes decides alone."""
    shapes = {"large": (4800,), "small": (4000,), "few": (3, 2000)}
    with torch.device("meta"):
        module = nn.ParameterDict({n: nn.Parameter(torch.empty(s)) for n, s in shapes.items()})
    fully_shard(module, mesh=init_device_mesh("cpu", (80,), mesh_dim_names=("shards",)))
    adam = optim.optimizer(module.named_parameters(), config.Optim())
    for k, p in enumerate(adam.param_groups[0]["params"] + adam.param_groups[-1]["params"]):
        adam.init_state(adam.param_groups[0], p, 0, k)
    kinds = {n: (adam.state[p]["state1"].dtype, adam.state[p]["state1"].numel()) for n, p in module.items()}
    assert kinds == {"large": (torch.uint8, 60), "small": (torch.float32, 50), "few": (torch.uint8, 2000)}


# -- files ------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """The two tensors of `trained`, with names."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__()
        self.a, self.b = weights


def written(folder: Path, ends: list[list[int]]) -> tuple[Two, torch.optim.Optimizer, dict]:
    """Files of as many ranks as `ends` has rows: where each rank's part of the two tensors ends; and what a checkpoint
    says of them."""
    weights, adam = trained()
    model, named = Two(weights), {}
    (folder / "s").mkdir(exist_ok=True)
    for number, stops in enumerate(ends):
        starts = ends[number - 1] if number else [0, 0]
        tensors, cuts = {}, {}
        for (name, p, kept, _), start, stop in zip(shard_files.kept(model, adam), starts, stops, strict=True):
            for key, t in kept.items():
                unit = BLOCK if key in SCALES else 1
                tensors[f"{key}/{name}"] = t.flatten()[start // unit : -(-stop // unit)].clone()
            cuts[name] = (start, stop, p.numel())
        about = {"cuts": json.dumps(cuts), "steps": json.dumps({"a": 3, "b": 3})}
        file = f"{number:05d}-of-{len(ends):05d}.safetensors"
        named |= shard_files.write(folder / "s", shard_files.Mine(file, tensors, about))
    return model, adam, {"folder": "s", "files": {name: list(of) for name, of in named.items()}}


WHOLE = [[2304, 27], [4608, 54], [6144, 80]]  # of three ranks


def test_shards_of_three_ranks_go_back_into_one(tmp_path, alone):
    model, adam, named = written(tmp_path, WHOLE)
    other = Two([nn.Parameter(torch.zeros(64, 96)), nn.Parameter(torch.zeros(80))])
    fresh = optim.optimizer(other.named_parameters(), config.Optim())
    shard_files.verify(tmp_path, named)
    shard_files.restore(other, fresh, shard_files.opened(tmp_path, named))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        before, after = adam.state[p], fresh.state[q]
        assert before.keys() == after.keys()
        assert before["step"] == after["step"] == 3
        assert all(torch.equal(before[k], after[k]) for k in before if k != "step")
        p.grad = q.grad = torch.ones_like(p)
    adam.step(), fresh.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("ends", [[[2304, 27], [4608, 54]], [[2304, 27], [2304, 80]]])
def test_shards_that_do_not_make_up_a_tensor_are_refused(tmp_path, ends):
    *_, named = written(tmp_path, ends)
    with pytest.raises(shard_files.ShardError, match="the shards of a do not make up its 6144 elements"):
        shard_files.opened(tmp_path, named)


SECOND = "00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), "is missing, one of 3 shards"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-100]),
            r"is damaged: it has [\d,]+ bytes, [\d,]+ were written",
        ),
    ],
)
def test_a_shard_that_is_missing_or_cut_off_is_refused_by_name(tmp_path, change, words):
    *_, named = written(tmp_path, WHOLE)
    change(tmp_path / "s" / SECOND)
    with pytest.raises(shard_files.ShardError, match=f"{SECOND} {words}"):
        shard_files.opened(tmp_path, named)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def of_another_step(path: Path) -> None:
    """Same tensors, same cuts, as many bytes."""
    with safe_open(path, "pt") as file:
        tensors, about = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({n: t + 1 for n, t in tensors.items()}, path, metadata=about)


@pytest.mark.parametrize("change", [flip, of_another_step])
def test_a_shard_that_is_another_one_is_refused_by_name(tmp_path, change, alone):
    """It can be opened; safetensors has no checksums."""
    *_, named = written(tmp_path, WHOLE)
    change(tmp_path / "s" / SECOND)
    shard_files.opened(tmp_path, named)
    with pytest.raises(shard_files.ShardError, match=f"{SECOND} is not the file that was written"):
        shard_files.verify(tmp_path, named)


def test_shards_of_other_tensors_are_refused(tmp_path):
    *_, named = written(tmp_path, WHOLE)
    saved = shard_files.opened(tmp_path, named)
    for shapes, words in (
        ({"a": (64, 96)}, "holds 1 tensors that do not learn here, the first b"),
        ({"a": (64, 96), "b": (80,), "c": (3,)}, "lacks 1 tensors that learn here, the first c"),
        ({"a": (64, 95), "b": (80,)}, "a has 6144 elements, this model's 6080"),
    ):
        model = nn.ParameterDict({n: nn.Parameter(torch.zeros(s)) for n, s in shapes.items()})
        with pytest.raises(shard_files.ShardError, match=words):
            shard_files.restore(model, optim.optimizer(model.named_parameters(), config.Optim()), saved)


def test_shards_that_no_checkpoint_names_are_removed(tmp_path):
    for name in ("shards-00000002", "shards-00000004", "shards-00000006"):
        (tmp_path / name).mkdir()
    torch.save({"shards": {"folder": "shards-00000006"}}, tmp_path / "last.ckpt")
    torch.save({"shards": {"folder": "shards-00000002"}}, tmp_path / "best.ckpt")
    shard_files.forget(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("shards-*")) == ["shards-00000002", "shards-00000006"]


def test_shards_are_never_written_over_those_that_a_checkpoint_names(tmp_path):
    """Killed between best.ckpt of step 6 and last.ckpt, still of step 4, a run comes to step 6 again."""
    for number, name in ((4, "last"), (6, "best")):
        folder = shard_files.place(tmp_path, number)
        torch.save({"shards": {"folder": folder}}, tmp_path / f"{name}.ckpt")
    (tmp_path / "shards-00000005").mkdir()
    assert shard_files.place(tmp_path, 6) == "shards-00000006+"
    there = sorted(p.name for p in tmp_path.glob("shards-*"))
    assert there == ["shards-00000004", "shards-00000006", "shards-00000006+"]
    assert shard_files.place(tmp_path, 6) == "shards-00000006+"  # killed once more: what it left is not named
