"""The config is strict, says where each value came from, and gives the same hash for the same values."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from midasheng.config import (
    ConfigError,
    binding,
    check_start,
    fingerprint,
    flat,
    keys_table,
    length,
    load,
    scales,
    schema,
)
from tests.conftest import CONFIGS

STAGE2 = CONFIGS / "stage2_pretrain.yaml"
STAGES = sorted(CONFIGS.glob("stage*.yaml"))
ALL = sorted(p for p in CONFIGS.rglob("*.yaml") if "scale" not in p.parts)
SMALL = "name: stage1_align\ntrain: [audio_encoder.*]\n"


def small(tmp_path: Path, stage: str = SMALL, scale: str = "{}", settings: tuple[str, ...] = (), **more: str):
    """Load a stage file `stage1_align.yaml` beside a scale `s`; `more`: other files by stem."""
    (tmp_path / "scale").mkdir(exist_ok=True)
    (tmp_path / "scale" / "s.yaml").write_text(scale)
    for stem, text in {"stage1_align": stage, **more}.items():
        (tmp_path / f"{stem}.yaml").write_text(text)
    return load(tmp_path / "stage1_align.yaml", "s", list(settings), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("optim: {lrr: 1}", "unknown key `optim.lrr`; did you mean `optim.lr`?"),
        ("lora: {target: [a]}", "did you mean `lora.targets`?"),
        ("weight_decay: 1", "did you mean `optim.weight_decay`?"),
        ("model: {encoder: {dimm: 3}}", "did you mean `model.encoder.dim`?"),
        ("lora: 3", "lora is a section"),
        ("lora:", "lora is a section"),
        ("model: {encoder: 3}", "model.encoder is a section"),
        ("lora: {rank: {x: 3}}", "unknown key `lora.rank.x`; did you mean `lora.rank`?"),
        ("lora: {rank: eight}", "lora.rank: .*'eight'"),
        ("lora: {rank: 8.5}", "lora.rank: .*8.5"),
        ("lora: {targets: q_proj}", "lora.targets"),
        ("log: {progress: 3.5}", "log.progress"),
        ("data: {mix: null}", "data.mix"),
        ("optim: {lr: .nan}", "optim.lr: nan"),
        ("optim: {lr_for: {x: fast}}", "optim.lr_for.x"),
        ("start: [{from: a}]", r"start\[0\]: write"),
        ("start: [{from: '${weights.encodr}', take: ['*']}]", "weights.encodr"),
        ("run: {length: 3}", "run.length: `3` is no length"),
        ("run: {length: 1.2.3 steps}", "run.length: `1.2.3 steps` is no length"),
        ("run: {warmup: -3 steps}", "run.warmup"),
        ("run: {precision: bf16-true}", "run.precision: 'bf16-true' is not offered.* does not move"),
        ("run: {precision: fp16}", "run.precision"),
        ("optim: {name: sgd}", "adamw8bit or adamw"),
        ("batch: {kind: huge}", "report or throughput"),
        ("data: {clips: none}", "data.clips: 'none'; write heard, left_out or told"),
        ("data: {damaged: ignore}", "data.damaged: 'ignore'; write refuse or keep"),
        ("hardware: {attention: flash}", "hardware.attention: 'flash'; write auto, sdpa or varlen"),
        ("data: {on_change: go_on}", "data.on_change: 'go_on'; write refuse or restart_plan"),
    ],
)
def test_a_mistake_in_any_layer_is_named(tmp_path, wrong, says):
    with pytest.raises(ConfigError, match=says):
        small(tmp_path, SMALL + wrong)
    with pytest.raises(ConfigError, match=says):
        small(tmp_path, scale=wrong)
    settings = [f"{k}={v}" for k, v in flat(yaml.safe_load(wrong)).items() if v is not None and not isinstance(v, list)]
    if settings and "nan" not in wrong:
        with pytest.raises(ConfigError, match=says):
            small(tmp_path, settings=tuple(settings))


def test_layer_of_a_mistake_is_named(tmp_path):
    for layer, kwargs in {
        "stage1_align.yaml": {"stage": SMALL + "lor: {rank: 3}"},
        "s.yaml": {"scale": "lor: {rank: 3}"},
        r"s.yaml \(stages.stage1_align\)": {"scale": "stages: {stage1_align: {lor: {rank: 3}}}"},
        "command line": {"settings": ("lor.rank=3",)},
    }.items():
        with pytest.raises(ConfigError, match=f"^{layer}: unknown key `lor.rank`; did you mean `lora.rank`"):
            small(tmp_path, **kwargs)


@pytest.mark.parametrize("setting", ["lora.rank", "=3", "lora.targets=[a", "lora.rank=${"])
def test_unreadable_setting(tmp_path, setting):
    with pytest.raises(ConfigError, match=re.escape(setting)):
        small(tmp_path, settings=(setting,))


def test_unreadable_and_missing_files(tmp_path):
    with pytest.raises(ConfigError, match=r"no such stage file; there are .*stage2_qkvo.yaml, .*stage1_align.yaml"):
        load(CONFIGS / "stage9.yaml", "mini", [], CONFIGS)
    with pytest.raises(ConfigError, match=r"SCALE=minii: unknown scale; did you mean mini\? \(there are: .*0.6b.*mini"):
        load(STAGE2, "minii", [], CONFIGS)
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        small(tmp_path, "include: nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        small(tmp_path, "name: [a")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        small(tmp_path, SMALL + "run: {seed: 1}\nrun: {seed: 2}")
    with pytest.raises(ConfigError, match="expected `key: value` lines"):
        small(tmp_path, "[1, 2]")


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        ("stages: {stage1_aling: {run: {seed: 3}}}", "stages.stage1_aling is no stage; did you mean `stage1_align`?"),
        ("stages: {stage1_align: 3}", "write `stages:`"),
        ("stages: 3", "write `stages:`"),
    ],
)
def test_override_of_no_stage_is_an_error(tmp_path, scale, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        small(tmp_path, scale=scale)


def test_include_chain_and_cycle(tmp_path):
    files = {"middle": "include: base.yaml\nlora: {rank: 3, alpha: 7}", "base": "lora: {rank: 2}\nrun: {seed: 5}"}
    loaded = small(tmp_path, SMALL + "include: middle.yaml\nlora: {alpha: 9}", **files)
    assert (loaded.stage.lora.rank, loaded.stage.lora.alpha, loaded.stage.run.seed) == (3, 9, 5)
    names = [loaded.origin[k] for k in ("lora.rank", "lora.alpha", "run.seed")]
    assert names == ["middle.yaml", "stage1_align.yaml", "base.yaml"]
    with pytest.raises(ConfigError, match=r"includes itself through .*stage1_align.yaml -> .*middle.yaml"):
        small(tmp_path, SMALL + "include: middle.yaml", middle="include: stage1_align.yaml")


def test_a_scale_includes_another_one(tmp_path):
    """The included scale with its part for the stage lies below the whole of the including one."""
    base = """
        lora: {rank: 1, alpha: 1, dropout: 0.1}
        run: {seed: 1}
        stages: {stage1_align: {lora: {alpha: 2, dropout: 0.2}, run: {seed: 2}, log: {every: 2}}, other: {log: {every: 9}}}
        """
    top = """
        include: base.yaml
        lora: {dropout: 0.3}
        run: {seed: 3}
        stages: {stage1_align: {run: {seed: 4}}}
        """
    (tmp_path / "scale").mkdir()
    (tmp_path / "scale" / "base.yaml").write_text(base)
    loaded = small(tmp_path, scale=top, other="name: other")
    expected = {
        "lora.rank": (1, "base.yaml"), "lora.alpha": (2, "base.yaml (stages.stage1_align)"),
        "lora.dropout": (0.3, "s.yaml"), "run.seed": (4, "s.yaml (stages.stage1_align)"),
        "log.every": (2, "base.yaml (stages.stage1_align)"),
    }  # fmt: skip
    values = flat(asdict(loaded.stage))
    assert {k: (values[k], loaded.origin[k]) for k in expected} == expected
    for content, says in {
        "stages: {stage2: {}}": r"^base.yaml: stages.stage2 is no stage",
        "include: s.yaml": r"includes itself through .*s.yaml -> .*base.yaml",
    }.items():
        (tmp_path / "scale" / "base.yaml").write_text(content)
        with pytest.raises(ConfigError, match=says):
            small(tmp_path, scale=top)
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        small(tmp_path, scale="include: nowhere.yaml")


def test_each_layer_covers_the_one_below(tmp_path):
    layers = ["default", "stage1_align.yaml", "s.yaml", "s.yaml (stages.stage1_align)", "command line"]
    keys = ["run.seed", "lora.rank", "batch.packs_per_step", "log.every", "hardware.devices"]
    setting = [dict.fromkeys(keys[i:], i) for i in range(1, 5)]  # layer i sets all keys but the first i to i

    def text(values: dict[str, int]) -> str:
        tree: dict[str, dict[str, int]] = {}
        for k, v in values.items():
            tree.setdefault(k.split(".")[0], {})[k.split(".")[1]] = v
        return yaml.safe_dump(tree)

    scale = text(setting[1]) + yaml.safe_dump(
        {"stages": {"stage1_align": yaml.safe_load(text(setting[2])), "other": {"run": {"seed": 99}}}}
    )
    settings = tuple(f"{k}={v}" for k, v in setting[3].items())
    loaded = small(tmp_path, SMALL + text(setting[0]), scale, settings, other="name: other")
    values = flat(asdict(loaded.stage))
    assert [values[k] for k in keys] == [0, 1, 2, 3, 4]
    assert [loaded.origin.get(k, "default") for k in keys] == layers
    lines = dict(line.split(": ", 1) for line in loaded.yaml().splitlines())
    assert [lines[k].split("# ")[1] for k in keys] == layers


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)
def test_written_config_reads_back_to_the_same_values(path):
    """PyYAML takes 1e-05 for a string: every resume of stage 3 would be refused."""
    settings = ["data.mix='a # b'", "weights.encoder=ä:b", "optim.lr=1e-5", "data.root='1e-5'", "run.seed=0"]
    loaded = load(path, "7b", settings, CONFIGS)
    back = yaml.safe_load(loaded.yaml())
    assert back == flat(asdict(loaded.stage))
    assert {k: back[k] for k in binding(loaded.stage)} == binding(loaded.stage)
    assert (back["optim.lr"], back["optim.eps"], back["data.root"]) == (1e-5, 1e-8, "1e-5")


def test_keys_are_documented_and_the_right_ones_are_free():
    free = {name for name, item in schema().items() if item.metadata["free"]}
    looks = {"data.val_clips", "data.also", "data.probe", "data.answers"}
    # where, and what is put up with
    looks |= {"data.index", "data.decode_share", "data.damaged", "data.on_change", "optim.max_skips"}
    assert free == {n for n in schema() if n.startswith(("hardware.", "log.", "forecast."))} | looks
    table = dict(line.split(maxsplit=1) for line in keys_table().splitlines()[:-1])
    assert table.keys() == schema().keys() == flat(asdict(load(STAGE2, "mini", [], CONFIGS).stage)).keys()
    for name, item in schema().items():
        doc = item.metadata["doc"]
        assert len(doc) > 4, name
        assert doc == doc.strip(), name
        assert not doc.endswith((".", ",", ";")), name
        assert doc in table[name]


def test_settings_that_change_results_change_the_hash():
    """The hash of a run covers what results depend on, and nothing else."""
    base = fingerprint(load(STAGE2, "mini", [], CONFIGS).stage)
    assert fingerprint(load(STAGE2, "mini", ["data.index=/elsewhere"], CONFIGS).stage) == base
    for setting in ("hardware.workers=3", "log.every=7", "data.val_clips=3", "data.also=[sft]", "data.answers=3"):
        assert fingerprint(load(STAGE2, "mini", [setting], CONFIGS).stage) == base
    for setting in (
        "run.seed=3",
        "lora.targets=[q_proj]",
        "optim.lr_for.x=1",
        "data.root=elsewhere",
        "data.clips=left_out",
    ):
        assert fingerprint(load(STAGE2, "mini", [setting], CONFIGS).stage) != base


def test_key_order_does_not_change_the_hash(tmp_path):
    def backwards(tree):
        return {k: backwards(tree[k]) for k in reversed(tree)} if isinstance(tree, dict) else tree

    scale = (CONFIGS / "scale" / "mini.yaml").read_text()
    other = yaml.safe_dump(backwards(yaml.safe_load(scale)), sort_keys=False)
    assert other.splitlines()[0] == "stages:"
    text = (CONFIGS / "stage1_align.yaml").read_text()
    more = {p.stem: p.read_text() for p in CONFIGS.glob("*.yaml") if p.stem != "stage1_align"}
    one, two = (fingerprint(small(tmp_path, text, s, **more).stage) for s in (scale, other))
    assert one == two == fingerprint(load(CONFIGS / "stage1_align.yaml", "mini", [], CONFIGS).stage)


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_every_stage_file_loads_at_every_scale(path):
    for scale in scales(CONFIGS):
        if scale in ("mini", "generated", "small"):
            loaded = load(path, scale, [], CONFIGS)
        elif path.stem == "text_decoder":
            continue  # the other scales have published text weights
        else:
            if "stage1" in path.stem:
                with pytest.raises(ConfigError, match=r"start\[0\].from is empty: this scale needs pretrained weights"):
                    check_start(load(path, scale, [], CONFIGS).stage)
            loaded = load(path, scale, ["weights.encoder=dasheng.pt"], CONFIGS)
            assert loaded.stage.weights.encoder == "dasheng.pt"
            if "stage1" in path.stem:
                assert loaded.stage.start[0] == {"from": "dasheng.pt", "take": ["audio_encoder.*"]}
        assert loaded.stage.name == (path.stem if path in STAGES else loaded.stage.name)
        assert loaded.origin["model.encoder.dim"] == ("mini.yaml" if scale == "generated" else f"{scale}.yaml")


def test_lists_from_the_command_line():
    stage = load(STAGE2, "mini", ["lora.targets=[a, b]", "train=[audio_encoder.*]"], CONFIGS).stage
    assert (stage.lora.targets, stage.train) == (["a", "b"], ["audio_encoder.*"])


def test_an_empty_value_means_none_where_that_is_a_value():
    """SET="data.probe=''" comes without its quotes: a shell takes them away."""
    assert load(STAGES[0], "mini", [], CONFIGS).stage.data.probe
    for written in ("data.probe=", "data.probe=''"):
        assert load(STAGES[0], "mini", [written], CONFIGS).stage.data.probe == ""
    with pytest.raises(ConfigError, match=r"optim.lr: is empty; give it a value or leave it out"):
        load(STAGES[0], "mini", ["optim.lr="], CONFIGS)


@pytest.mark.parametrize(
    ("text", "means"),
    [("300 steps", (300, "steps")), (" 1.4 epochs", (1.4, "epochs")), ("2e3audio_hours", (2000, "audio_hours"))],
)
def test_length(text, means):
    assert length(text, "x") == means
