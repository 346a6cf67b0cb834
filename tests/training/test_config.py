"""Schedules, the configuration's checks, and the flags that are made from it. No torch, no processes."""

import dataclasses
import json
import math
import typing

import pytest

from megatron.dmc import schedule
from megatron.dmc.config import OptimizerConfig, RunConfig, StageConfig, load_file
from megatron.dmc.training import arguments


def resolve(*argv, saved=None):
    return arguments.resolve(list(argv), lambda asked: saved)


# Schedules


def test_target_rises_over_two_retrofits_without_a_jump():
    first = StageConfig(stage="retrofit", start_cr=1.0, target_cr=2.0, iters_per_cr=10)
    second = StageConfig(stage="retrofit", start_cr=2.0, target_cr=4.0, iters_per_cr=10)
    assert (schedule.train_iters(first), schedule.train_iters(second)) == (10, 20)
    targets = [schedule.target_cr(first, i) for i in range(10)] + [schedule.target_cr(second, i) for i in range(20)]
    assert targets == pytest.approx([1 + 0.1 * (i + 1) for i in range(30)])
    assert targets[9] == 2.0 and targets[-1] == 4.0  # exactly
    assert schedule.target_cr(second, 1000) == 4.0
    whole = StageConfig(stage="retrofit", target_cr=4.0, iters_per_cr=10)
    assert [schedule.target_cr(whole, i) for i in range(30)] == pytest.approx(targets)


def test_the_authors_lengths():
    def length(**values):
        return schedule.train_iters(StageConfig(**values))

    assert length(stage="zero_out") == 250 and length(stage="finetune") == 2000
    assert length(stage="retrofit", target_cr=2) == 6000 and length(stage="retrofit", target_cr=4) == 18000
    assert length(stage="retrofit", target_cr=4, train_iters=7) == 7


def test_only_two_stages_compress():
    for stage in ("pretrain", "zero_out"):
        config = StageConfig(stage=stage, train_iters=5)
        assert not schedule.compresses(config) and schedule.target_cr(config, 3) == 1.0
    assert schedule.target_cr(StageConfig(stage="finetune", target_cr=3.5), 0) == 3.5


def test_neuron_decays_linearly_to_zero():
    config = StageConfig(stage="zero_out", train_iters=10)
    assert [schedule.neuron_scale(config, i) for i in range(10)] == pytest.approx(
        [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0]
    )
    assert schedule.neuron_scale(config, 8) == schedule.neuron_scale(config, 10) == 0.0
    assert schedule.neuron_scale(StageConfig(stage="pretrain", train_iters=5), 4) == 1.0
    assert schedule.neuron_scale(StageConfig(stage="retrofit", target_cr=2), 0) == 0.0
    assert schedule.neuron_scale(StageConfig(stage="finetune", target_cr=2), 0) == 0.0


def test_learning_rates():
    stage = StageConfig(stage="pretrain", train_iters=12)

    def rates(**values):
        return [schedule.learning_rate(stage, OptimizerConfig(**values), i) for i in range(12)]

    assert rates(lr=3e-5) == [3e-5] * 12
    warm = rates(lr=1.0, min_lr=0.1, lr_warmup_iters=2, lr_decay_style="cosine")
    assert warm[:3] == [0.5, 1.0, 1.0]
    assert warm[7] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rates(lr=1.0, lr_decay_style="linear") == pytest.approx([1 - i / 12 for i in range(12)])
    end = OptimizerConfig(lr=1.0, min_lr=0.1, lr_decay_style="cosine")
    assert schedule.learning_rate(stage, end, 12) == pytest.approx(0.1)
    assert schedule.learning_rate(stage, end, 99) == pytest.approx(0.1)


# Checks: section, values, world size, what the message must say (the value, and the fix)

GOOD = dict(stage=dict(stage="pretrain", train_iters=5), training=dict(global_batch_size=8))
YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1024}
WRONG = [
    ("dmc", dict(window=0), ["window is 0", "null for no window"]),
    ("dmc", dict(temperature=0), ["temperature is 0.0", "positive"]),
    ("dmc", dict(importance_epsilon=-1), ["importance_epsilon is -1.0"]),
    ("dmc", dict(loss_weight=-1), ["loss_weight is -1.0"]),
    ("model", dict(num_layers=0), ["num_layers is 0"]),
    ("model", dict(vocab_size=-5), ["vocab_size is -5"]),
    ("model", dict(num_query_groups=0), ["num_query_groups is 0"]),
    ("model", dict(num_query_groups=5), ["num_attention_heads 32", "num_query_groups 5"]),
    ("model", dict(hidden_size=4100), ["hidden_size 4100", "num_attention_heads 32", "set kv_channels"]),
    ("model", dict(kv_channels=20), ["head dimension 20", "multiple of 8"]),
    ("model", dict(rope_scaling={"rope_type": "longrope"}), ["'longrope'", "llama3 and yarn"]),
    ("model", dict(rope_scaling={"rope_type": ["yarn"]}), ["['yarn']", "llama3 and yarn"]),
    ("model", dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ["original_max_position_embeddings"]),
    ("model", dict(rope_scaling={**YARN, "mscal": 1}), ["mscal", "may have", "mscale_all_dim"]),
    ("model", dict(rope_scaling={**YARN, "factor": 0.5}), ["rope_scaling.factor is 0.5"]),
    ("model", dict(rope_scaling={**YARN, "factor": "4"}), ["rope_scaling.factor is '4'", "positive number"]),
    ("model", dict(rope_scaling={**YARN, "truncate": 1}), ["rope_scaling.truncate is 1"]),
    ("model", dict(rope_scaling={**YARN, "beta_slow": 32}), ["beta_fast 32", "beta_slow 32"]),
    ("model", dict(rope_scaling={**YARN, "factor": 8}), ["max_position_embeddings is 4096", "to 8192"]),
    ("model", dict(rope_scaling={"rope_type": "llama3", "factr": 8}), ["factr", "low_freq_factor"]),
    ("parallel", dict(tensor_model_parallel_size=0), ["tensor_model_parallel_size is 0"]),
    ("parallel", dict(tensor_model_parallel_size=64), ["tensor_model_parallel_size 64", "32 KV heads", "at most 32"]),
    ("parallel", dict(tensor_model_parallel_size=3), ["num_attention_heads 32", "tensor_model_parallel_size 3"]),
    ("parallel", dict(pipeline_model_parallel_size=5), ["num_layers 32", "5 pipeline chunks"]),
    ("parallel", dict(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=3), ["num_layers 32", "12"]),
    ("parallel", dict(virtual_pipeline_model_parallel_size=2), ["needs pipeline_model_parallel_size > 1"]),
    ("parallel", dict(virtual_pipeline_model_parallel_size=0), ["virtual_pipeline_model_parallel_size is 0"]),
    ("parallel", dict(sequence_parallel=True), ["sequence_parallel needs tensor_model_parallel_size > 1"]),
    (
        "parallel",
        dict(context_parallel_size=2),
        ["context_parallel_size is 2", "docs/training.md", "use sequence_parallel"],
    ),
    ("parallel", dict(overlap_param_gather=True), ["use_distributed_optimizer and overlap_grad_reduce"]),
    ("parallel", dict(recompute_modules=["mlp", "moe"]), ["['moe']", "core_attn, mlp"]),
    ("stage", dict(train_iters=0), ["train_iters is 0"]),
    ("stage", dict(train_iters=None), ["stage pretrain needs train_iters"]),
    ("stage", dict(stage="retrofit"), ["retrofit needs target_cr"]),
    ("stage", dict(stage="retrofit", target_cr=0.5), ["target_cr is 0.5", "at least 1"]),
    ("stage", dict(stage="retrofit", target_cr=2, start_cr=2, train_iters=None), ["target_cr 2.0", "already"]),
    ("stage", dict(stage="zero_out", target_cr=2), ["zero_out does not compress", "target_cr 2.0"]),
    ("stage", dict(iters_per_cr=0), ["iters_per_cr is 0"]),
    ("stage", dict(decay_fraction=1.5), ["decay_fraction is 1.5", "(0, 1]"]),
    ("optimizer", dict(lr=0), ["lr is 0.0"]),
    ("optimizer", dict(min_lr=1), ["min_lr 1.0", "lr 3e-05"]),
    ("optimizer", dict(lr_warmup_iters=-1), ["lr_warmup_iters is -1"]),
    ("optimizer", dict(adam_beta2=1.0), ["adam_beta2 is 1.0"]),
    ("optimizer", dict(weight_decay=-0.1), ["weight_decay is -0.1"]),
    ("optimizer", dict(clip_grad=-1), ["clip_grad is -1.0"]),
    ("data", dict(seq_length=0), ["seq_length is 0"]),
    ("data", dict(seq_length=8192), ["seq_length 8192", "max_position_embeddings 4096", "shorten"]),
    ("data", dict(num_workers=-1), ["num_workers is -1"]),
    ("training", dict(global_batch_size=7), ["global_batch_size 7", "micro_batch_size 1 x data parallel size 8"]),
    ("training", dict(micro_batch_size=0), ["micro_batch_size is 0"]),
    ("training", dict(keep_checkpoints=0), ["keep_checkpoints is 0"]),
    ("training", dict(save_interval=5), ["save_interval is 5", "save is not set"]),
]


@pytest.mark.parametrize("section, values, says", WRONG, ids=[f"{s}-{'-'.join(v)}" for s, v, _ in WRONG])
def test_wrong_values_are_named(section, values, says):
    data = {**GOOD, section: {**GOOD.get(section, {}), **values}}
    with pytest.raises(ValueError) as error:
        RunConfig.from_dict(data).check(8)
    for part in says:
        assert part in str(error.value)


def test_world_size_must_fit():
    config = RunConfig.from_dict(
        {**GOOD, "parallel": dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)}
    )
    config.check(8)
    with pytest.raises(ValueError, match="world size 6 is not divisible by tensor x pipeline parallel size 2 x 2"):
        config.check(6)
    config.parallel.virtual_pipeline_model_parallel_size = 2
    config.training.global_batch_size = 3
    with pytest.raises(
        ValueError, match="3 micro-batches per step are not divisible by pipeline_model_parallel_size 2"
    ):
        config.check(4)


def test_defaults_pass_and_survive_a_round_trip():
    config = RunConfig.from_dict(GOOD)
    config.check(8)
    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "data, says",
    [
        ({"modle": {}}, ["unknown configuration key modle", "model"]),
        ({"model": {"layers": 2, "heads": 3}}, ["keys model.heads, model.layers", "num_layers"]),
        ({"model": 5}, ["model. must be a mapping"]),
        ([], ["must be a mapping, not list"]),
        ({"model": {"num_layers": "many"}}, ["model.num_layers is 'many'", "int"]),
        ({"model": {"num_layers": True}}, ["model.num_layers is True"]),
        ({"optimizer": {"lr": "fast"}}, ["optimizer.lr is 'fast'", "number"]),
        ({"optimizer": {"lr": float("nan")}}, ["optimizer.lr is nan", "finite"]),
        ({"optimizer": {"lr": "inf"}}, ["optimizer.lr is inf", "finite"]),
        ({"stage": {"stage": "finish"}}, ["stage.stage is 'finish'", "finetune"]),
        ({"data": {"data_path": "p"}}, ["data.data_path is 'p'", "list"]),
        ({"training": {"bf16": "yes"}}, ["training.bf16 is 'yes'", "bool"]),
    ],
)
def test_unknown_keys_and_types_are_named(data, says):
    with pytest.raises(ValueError) as error:
        RunConfig.from_dict(data)
    for part in says:
        assert part in str(error.value)


# Files and flags


@pytest.mark.parametrize(
    "name, text",
    [
        ("c.yaml", "optimizer: {lr: 3e-5, min_lr: 1}\nmodel: {rotary_base: 500000, num_query_groups: null}\n"),
        (
            "c.json",
            '{"optimizer": {"lr": "3e-5", "min_lr": 1}, "model": {"rotary_base": 500000, "num_query_groups": null}}',
        ),
    ],
)
def test_yaml_and_json_mean_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    config = resolve("--config", str(tmp_path / name))
    assert config.optimizer.lr == 3e-5 and config.optimizer.min_lr == 1.0 and isinstance(config.optimizer.min_lr, float)
    assert config.model.rotary_base == 5e5 and config.model.num_query_groups is None


def test_unreadable_files(tmp_path):
    assert load_file_error(tmp_path / "absent.yaml").endswith("absent.yaml does not exist")
    for name, text in (("a.json", "{"), ("b.yaml", "a: [")):
        (tmp_path / name).write_text(text)
        assert f"{name} cannot be read" in load_file_error(tmp_path / name)
    (tmp_path / "empty.yaml").write_text("")
    assert load_file(tmp_path / "empty.yaml") == {}


def load_file_error(path):
    with pytest.raises(ValueError) as error:
        load_file(path)
    return str(error.value)


def test_every_field_has_a_flag():
    options = {option for action in arguments.build_parser()._actions for option in action.option_strings}
    names = [
        f.name
        for section in dataclasses.fields(RunConfig)
        for f in dataclasses.fields(typing.get_type_hints(RunConfig)[section.name])
    ]
    assert len(names) == len(set(names)) > 60
    for name in names:
        assert "--" + name.replace("_", "-") in options
    assert resolve() == RunConfig()


def test_flags_win_over_the_file_and_the_file_over_the_checkpoint(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optimizer: {lr: 1e-3, clip_grad: 2}\ndmc: {loss_weight: 3}\ntraining: {bf16: true, save: there}\n")
    saved = RunConfig.from_dict(
        {
            "model": dict(num_layers=2),
            "dmc": dict(window=None, loss_weight=7),
            "optimizer": dict(lr=9.0),
            "training": dict(seed=9),
        }
    ).to_dict()
    config = resolve(
        "--config",
        str(path),
        "--lr",
        "5e-4",
        "--no-bf16",
        "--save",
        "none",
        "--data-path",
        "a",
        "b",
        "--seed",
        "5",
        saved=saved,
    )
    assert (config.optimizer.lr, config.optimizer.clip_grad, config.training.bf16) == (5e-4, 2.0, False)
    assert config.training.save is None and config.data.data_path == ["a", "b"] and config.training.seed == 5
    # Only what belongs to the model comes from the checkpoint.
    assert config.model.num_layers == 2 and config.dmc.window is None and config.dmc.loss_weight == 3.0
    assert resolve(saved=saved).training.seed == 1234 and resolve(saved=saved).optimizer.lr == 3e-5


def test_a_model_other_than_the_checkpoints_is_refused(tmp_path):
    saved = RunConfig().to_dict()
    for argv, says in (
        (["--hidden-size", "64"], "model.hidden_size is 64, but the checkpoint was trained with 4096"),
        (["--window", "none"], "dmc.window is None, but the checkpoint was trained with 12"),
    ):
        with pytest.raises(ValueError, match=says):
            resolve(*argv, saved=saved)
    path = tmp_path / "c.yaml"
    path.write_text("model: {norm_epsilon: 1e-5, rotary_base: 10000}\n")  # YAML reads a string and an int
    assert resolve("--config", str(path), saved=saved).model == RunConfig().model


def test_decisions_may_be_chosen_until_a_stage_compresses():
    saved = RunConfig().to_dict()
    saved["stage"]["stage"] = "pretrain"  # as of an imported model
    assert resolve("--decision-bias", "3", saved=saved).dmc.decision_bias == 3.0
    saved["stage"]["stage"] = "finetune"
    with pytest.raises(ValueError, match="dmc.decision_bias is 3.0, but the checkpoint was trained with 5.0"):
        resolve("--decision-bias", "3", saved=saved)


def test_rope_scaling_and_switches_by_flag():
    scaling = dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    config = resolve("--rope-scaling", json.dumps(scaling), "--recompute-granularity", "none", "--sequence-parallel")
    assert config.model.rope_scaling == scaling and config.parallel.recompute_granularity is None
    assert config.parallel.sequence_parallel


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--leraning-rate", "1"], "unrecognized arguments: --leraning-rate"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--num-layers", "2.5"], "argument --num-layers: invalid int value"),
        (["--rope-scaling", "{"], "argument --rope-scaling"),
        (["--stage", "finish"], "invalid choice: 'finish'"),
    ],
)
def test_wrong_flags_are_value_errors(argv, says):
    with pytest.raises(ValueError, match=says):
        resolve(*argv)


def test_dump_reads_back(tmp_path):
    config = RunConfig.from_dict(GOOD)
    (tmp_path / "config.yaml").write_text(arguments.dump(config))
    assert RunConfig.from_dict(arguments.read_saved_config(tmp_path)) == config
    (tmp_path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(ValueError, match="lacks dmc, parallel"):
        arguments.read_saved_config(tmp_path)
