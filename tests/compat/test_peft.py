"""lorakit.compat.peft against peft: the same calls on the same models."""

import dataclasses
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit as lk
from lorakit.compat import peft as compat
from tests.conftest import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be contained:UserWarning")

IDS = torch.arange(24).view(2, 12)
OPTIONS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
# fp32 sums of up to 48 terms in another order, through two layers
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def close(a, b):
    torch.testing.assert_close(a, b, **CLOSE)


def randomize(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


@pytest.fixture(params=["transformers", "decoder"])
def base(request, tiny_dir):
    """A function that makes the model of `tiny_dir`, of either library."""
    from transformers import AutoModelForCausalLM

    if request.param == "decoder":
        return lambda: lk.load_model(tiny_dir, dtype="float32")
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


@pytest.fixture
def theirs(tiny_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


def logits(model, *args, **options):
    found = model(*args, **options)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.fixture
def adapters(tmp_path):
    """Directories `a` and `b` that peft wrote, with one adapter each."""
    config = peft.LoraConfig(**OPTIONS, task_type="CAUSAL_LM")
    model = tiny_llama(num_key_value_heads=2, vocab_size=300)
    model = peft.get_peft_model(model, config, adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    randomize(model).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["transformers", "decoder"])
def test_five_steps_of_sgd_give_the_weights_of_peft(theirs, tiny_dir, tmp_path, kind):
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**OPTIONS, task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    ours = tiny_llama(num_key_value_heads=2, vocab_size=300)
    if kind == "decoder":
        ours = lk.load_model(tiny_dir, dtype="float32")
    ours = compat.PeftModel.from_pretrained(ours, tmp_path, is_trainable=True)
    for model in (theirs, ours):
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.02)
        for _ in range(5):
            scores = logits(model, input_ids=IDS)[:, :-1]
            nn.functional.cross_entropy(scores.flatten(0, 1), IDS[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    truth = peft.get_peft_model_state_dict(theirs)
    found = compat.get_peft_model_state_dict(ours)
    assert found.keys() == truth.keys()
    start = load_file(tmp_path / "adapter_model.safetensors")
    assert max((truth[key] - start[key]).abs().max() for key in truth) > 1e-3
    for key, tensor in truth.items():  # of gradients of order 1, rounded in fp32
        assert (found[key] - tensor).abs().max() <= 1e-5, key

    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(
        tiny_llama(num_key_value_heads=2, vocab_size=300), tmp_path / "ours"
    )
    close(logits(again, IDS), logits(ours.eval(), IDS))
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = tiny_llama(num_key_value_heads=2, vocab_size=300)
    fresh = compat.PeftModel.from_pretrained(fresh, tmp_path / "theirs")
    close(logits(fresh, IDS), logits(theirs.eval(), IDS))


def test_the_trainer_of_transformers(theirs, tmp_path):
    from transformers import Trainer, TrainingArguments

    config = compat.LoraConfig(**OPTIONS, task_type=compat.TaskType.CAUSAL_LM)
    model = compat.get_peft_model(theirs, config)
    rows = [{"input_ids": IDS[0], "labels": IDS[0], "unwanted": "text"}] * 8
    args = TrainingArguments(
        tmp_path,
        max_steps=5,
        learning_rate=0.02,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    before = model(IDS, labels=IDS).loss
    Trainer(model, args, train_dataset=rows).train()
    assert model.eval()(IDS, labels=IDS).loss < before - 0.1


def test_names_and_counts_of_parameters(theirs, capsys):
    config = {**OPTIONS, "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    ours = tiny_llama(num_key_value_heads=2, vocab_size=300)
    ours = compat.get_peft_model(ours, compat.LoraConfig(**config))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**config))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.print_trainable_parameters()
    theirs.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert ours.base_model.model.model.layers[0] is ours.get_base_model().model.layers[0]
    assert ours.config is ours.get_base_model().config
    assert ours.device == torch.device("cpu")
    with pytest.raises(AttributeError, match="nothing"):
        ours.nothing  # noqa: B018


def test_packed_values_are_counted_as_values(tiny_dir):
    dense = lk.load_model(tiny_dir, dtype="float32")
    packed = lk.load_model(tiny_dir, dtype="float32", quantize="nf4")
    first, second = (
        compat.get_peft_model(m, compat.LoraConfig(**OPTIONS)) for m in (dense, packed)
    )
    assert first.get_nb_trainable_parameters() == second.get_nb_trainable_parameters()


def test_several_adapters(base, theirs, adapters):
    ours = compat.PeftModel.from_pretrained(base(), adapters / "a", adapter_name="a")
    theirs = peft.PeftModel.from_pretrained(theirs, adapters / "a", adapter_name="a")
    assert isinstance(ours, compat.PeftModelForCausalLM)
    for model in (ours, theirs):
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.training
        model.load_adapter(adapters / "b", adapter_name="b")
        assert model.active_adapter == "a"
        assert not any(p.requires_grad for p in model.parameters())
    first = logits(ours, IDS)
    close(first, logits(theirs, IDS))
    mixed = {"input_ids": IDS, "adapter_names": ["__base__", "b"]}
    close(logits(ours, **mixed), logits(theirs, **mixed))
    with ours.disable_adapter(), theirs.disable_adapter():
        close(logits(ours, IDS), logits(theirs, IDS))
    for model in (ours, theirs):
        model.set_adapter("b")
        assert model.active_adapter == "b"
        assert model.active_adapters == ["b"]
        assert any(p.requires_grad for p in model.parameters())
    assert (logits(ours, IDS) - first).abs().max() > 0.1
    close(logits(ours, IDS), logits(theirs, IDS))
    for model in (ours, theirs):
        model.add_adapter("c", type(model.peft_config["a"])(**OPTIONS))
        assert model.active_adapter == "b"
        model.delete_adapter("b")
        assert model.active_adapter == "a"
        assert set(model.peft_config) == {"a", "c"}
    close(logits(ours, IDS), logits(theirs, IDS))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("svd", {}),
        ("svd", {"svd_rank": 3}),
        ("cat", {}),
        ("linear", {}),
        ("ties", {"density": 0.5}),
    ],
)
def test_weighted_adapters(theirs, tmp_path, kind, options):
    model = peft.get_peft_model(theirs, peft.LoraConfig(**OPTIONS), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(**OPTIONS))
    randomize(model).save_pretrained(tmp_path)
    ours = tiny_llama(num_key_value_heads=2, vocab_size=300)
    ours = compat.PeftModel.from_pretrained(ours, tmp_path / "a", adapter_name="a")
    ours.load_adapter(tmp_path / "b", adapter_name="b")
    for each in (ours, model):
        each.add_weighted_adapter(["a", "b"], [0.7, 0.4], "both", combination_type=kind, **options)
        assert each.active_adapter == "a"
        each.set_adapter("both")
        each.eval()
    close(logits(ours, IDS), logits(model, IDS))


def test_files_lie_where_pefts_do(base, theirs, adapters):
    ours = compat.PeftModel.from_pretrained(base(), adapters / "a")
    ours.load_adapter(adapters / "b", adapter_name="b")
    ours.save_pretrained(adapters / "ours")
    theirs = peft.PeftModel.from_pretrained(theirs, adapters / "a")
    theirs.load_adapter(adapters / "b", adapter_name="b")
    theirs.save_pretrained(adapters / "theirs")

    def files(folder):
        found = {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")}
        return {name for name in found if not name.endswith("README.md")}

    assert files(adapters / "ours") == files(adapters / "theirs")
    for place in (".", "b"):
        first, second = (
            load_file(adapters / who / place / "adapter_model.safetensors")
            for who in ("ours", "theirs")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        written = json.loads((adapters / "ours" / place / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(theirs.get_base_model().name_or_path)
    ours.save_pretrained(adapters / "one", selected_adapters=["b"])
    assert files(adapters / "one") == {"b/adapter_config.json", "b/adapter_model.safetensors"}
    ours.save_pretrained(adapters / "none", is_main_process=False)
    assert not (adapters / "none").exists()


def test_merging(base, theirs, adapters):
    model = base()
    before = logits(model, IDS)
    ours = compat.PeftModel.from_pretrained(model, adapters / "a", adapter_name="a")
    ours.load_adapter(adapters / "b", adapter_name="b")
    theirs = peft.PeftModel.from_pretrained(theirs, adapters / "b").merge_and_unload()
    ours.merge_adapter(["b"])
    close(logits(ours, IDS), logits(theirs, IDS))
    ours.unmerge_adapter()
    merged = ours.merge_and_unload(progressbar=True, safe_merge=True, adapter_names=["b"])
    assert merged is model
    assert not lk.adapter_names(model)
    close(logits(merged, IDS), logits(theirs, IDS))
    again = compat.PeftModel.from_pretrained(base(), adapters / "a")
    assert torch.equal(logits(again.unload(), IDS), before)


def test_state_dicts(base, adapters):
    ours = compat.PeftModel.from_pretrained(base(), adapters / "a")
    state = compat.get_peft_model_state_dict(ours)
    truth = load_file(adapters / "a" / "adapter_model.safetensors")
    assert state.keys() == truth.keys()
    other = compat.get_peft_model(base(), compat.LoraConfig(**OPTIONS))
    compat.set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other, IDS), logits(ours, IDS))
    key = next(iter(state))
    with pytest.raises(lk.LorakitError, match=r"lora_A.weight is missing"):
        compat.set_peft_model_state_dict(other, {k: v for k, v in state.items() if k != key})
    with pytest.raises(lk.LorakitError, match="tensor x belongs to no adapted layer"):
        compat.set_peft_model_state_dict(other, {**state, "x": state[key]})
    with pytest.raises(lk.LorakitError, match=r"is \(3,\), the model needs \(4, "):
        compat.set_peft_model_state_dict(other, {**state, key: torch.zeros(3)})


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_state_dict_of_a_start_that_is_a_part_of_the_weight(tiny_dir, start):
    """It is plain LoRA of twice the rank, and goes back into the same adapter to the bit."""
    config = compat.LoraConfig(**OPTIONS, init_lora_weights=start)
    model = compat.get_peft_model(lk.load_model(tiny_dir, dtype="float32"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    before = model(IDS)
    state = {k: v.clone() for k, v in compat.get_peft_model_state_dict(model).items()}
    assert all(8 in tensor.shape for tensor in state.values())
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "lora_" in name or "start_" in name:
                tensor.normal_()
    assert not torch.allclose(model(IDS), before)
    compat.set_peft_model_state_dict(model, state)
    assert torch.equal(model(IDS), before)
    again = compat.get_peft_model_state_dict(model)
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "config",
    [
        lk.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        lk.VeraConfig(target_modules=["q_proj"], r=4),
        lk.AdaLoraConfig(target_modules=["q_proj"], total_step=9),
        lk.PromptTuningConfig(num_virtual_tokens=3),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_methods_are_saved_and_set(config, tiny_dir, tmp_path):
    model = compat.get_peft_model(lk.load_model(tiny_dir, dtype="float32"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    assert model.active_peft_config is model.peft_config["default"] is config
    model.save_pretrained(tmp_path)
    again = compat.PeftModel.from_pretrained(lk.load_model(tiny_dir, dtype="float32"), tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    other = compat.get_peft_model(lk.load_model(tiny_dir, dtype="float32"), config)
    compat.set_peft_model_state_dict(other, compat.get_peft_model_state_dict(model))
    if not isinstance(config, lk.VeraConfig):  # whose frozen matrices the seed makes, not the state
        assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.delete_adapter("b"),
        lambda m: m.delete_adapter("a"),
        lambda m: m.merge_adapter(["a"]),
        lambda m: m.merge_adapter(["b"]),
    ],
)
def test_what_trains_afterwards_is_what_trains_in_peft(change, frozen):
    def trains(library):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        config = library.LoraConfig(target_modules=["0", "1"], r=2)
        model = library.get_peft_model(model, config, "a")
        model.add_adapter("b", config)
        model.set_adapter("a", inference_mode=frozen)
        change(model)
        every = [(n, p) for n, p in model.named_parameters() if "lora_" in n]
        return {("a" in n.split("."), p.requires_grad) for n, p in every}

    assert trains(compat) == trains(peft)


def test_generation(theirs, adapters):
    ours = tiny_llama(num_key_value_heads=2, vocab_size=300)
    ours = compat.PeftModel.from_pretrained(ours, adapters / "a")
    theirs = peft.PeftModel.from_pretrained(theirs, adapters / "a")
    options = {
        "attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False,
        "pad_token_id": 0, "adapter_names": ["__base__", "default"],
    }  # fmt: skip
    found = ours.generate(input_ids=IDS, **options)
    assert torch.equal(found, theirs.generate(input_ids=IDS, **options))


@pytest.mark.parametrize("kind", ["transformers", "decoder"])
def test_preparing_for_few_bits(tiny_dir, kind):
    model = tiny_llama(num_key_value_heads=2, vocab_size=300)
    if kind == "decoder":
        model = lk.load_model(tiny_dir, dtype="float32")
    model = lk.quantize(model).to(torch.bfloat16)
    dtypes = [p.dtype for p in model.parameters()]
    assert compat.prepare_model_for_kbit_training(model) is model
    assert [p.dtype for p in model.parameters()] == dtypes
    assert not any(p.requires_grad for p in model.parameters())
    model = compat.get_peft_model(model, compat.LoraConfig(**OPTIONS)).train()
    logits(model, IDS).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert parameter.grad.abs().max() > 0, name


def test_reentrant_checkpointing_reaches_the_first_adapter():
    model = tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model = compat.get_peft_model(model, compat.LoraConfig(**OPTIONS)).train()
    model(IDS, labels=IDS).loss.backward()
    first = model.base_model.model.model.layers[0].self_attn.q_proj
    assert first.lora_B.grad.abs().max() > 0


def test_checkpointing_of_what_has_none():
    with pytest.raises(lk.LorakitError, match="a Linear has no gradient checkpointing"):
        compat.prepare_model_for_kbit_training(nn.Linear(2, 2))
    compat.prepare_model_for_kbit_training(nn.Linear(2, 2), use_gradient_checkpointing=False)


def test_any_module():
    model = compat.get_peft_model(
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        compat.LoraConfig(target_modules={"0"}, inference_mode=True),
        adapter_name="x",
    )
    assert model(torch.randn(4, 6)).shape == (4, 3)
    assert model.get_base_model()[0].adapters["x"].lora_A.shape == (8, 6)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_adapter("x")
    assert model.get_nb_trainable_parameters()[0] == 8 * (6 + 5)


def test_a_config_is_pefts_with_the_same_defaults(adapters):
    ours, theirs = compat.LoraConfig(), peft.LoraConfig()
    named = {"target_modules", "runtime_config", "peft_version", "megatron_core"}
    named |= {"qalora_group_size"}
    for field in dataclasses.fields(theirs):
        if field.name not in named:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert named < {field.name for field in dataclasses.fields(ours)}
    assert ours.target_modules == ["q_proj", "v_proj"]
    config = compat.PeftConfig.from_pretrained(adapters / "a")
    assert (config.r, config.lora_alpha, config.task_type) == (4, 6, "CAUSAL_LM")
    assert sorted(config.target_modules) == ["down_proj", "q_proj"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_qalora": True}, "lorakit has no use_qalora"),
        ({"layer_replication": [(0, 1)]}, "lorakit has no layer_replication"),
        ({"target_parameters": ["x"]}, "lorakit has no target_parameters"),
        ({"task_type": "SEQ_CLS"}, "name the head in modules_to_save"),
        ({"task_type": "CAUSAL"}, "choose one of SEQ_CLS"),
        ({"r": 0}, "r must be positive"),
    ],
)
def test_configs_that_are_refused(options, message):
    with pytest.raises(lk.LorakitError, match=message):
        compat.LoraConfig(**options)


def test_calls_that_are_refused(base, adapters):
    config = compat.LoraConfig(**OPTIONS)
    with pytest.raises(lk.LorakitError, match="mixed kinds"):
        compat.get_peft_model(base(), config, mixed=True)
    with pytest.raises(lk.LorakitError, match="adapters are fp32"):
        compat.get_peft_model(base(), config, autocast_adapter_dtype=False)
    with pytest.raises(lk.LorakitError, match="'q_prj' matches no layer"):
        compat.get_peft_model(base(), compat.LoraConfig(target_modules=["q_prj"]))
    model = compat.get_peft_model(base(), config).train()
    with pytest.raises(lk.LorakitError, match="in training mode"):
        model(IDS, adapter_names=["default", "default"])
    with pytest.raises(lk.LorakitError, match="there is no adapter 'defualt'"):
        model.set_adapter("defualt")
    with pytest.raises(lk.LorakitError, match="there is no adapter 'x'"):
        model.save_pretrained(adapters / "x", selected_adapters=["x"])
    with pytest.raises(lk.LorakitError, match="safetensors only"):
        model.save_pretrained(adapters / "x", safe_serialization=False)
    with pytest.raises(lk.LorakitError, match="one adapter is merged"):
        model.merge_and_unload(adapter_names=["default", "x"])
    with pytest.raises(lk.LorakitError, match="no svd_clamp"):
        model.add_weighted_adapter(["default"], [1.0], "x", svd_clamp=0.9)
    assert not (adapters / "x").exists()


def test_what_a_script_asks_the_inner_model(adapters):
    """`base_model` switches, merges and disables as the PeftModel does."""
    models = []
    for module in (peft, compat):
        model = tiny_llama(num_key_value_heads=2, vocab_size=300)
        model = module.PeftModel.from_pretrained(model, adapters / "a", "a", torch_device="cpu")
        model.load_adapter(adapters / "b", "b", torch_device="cpu")
        assert model.peft_config["a"].inference_mode
        model.base_model.set_adapter("b")
        assert [model.base_model.active_adapter] == model.active_adapters == ["b"]
        adapted = logits(model, IDS)
        model.base_model.disable_adapter_layers()
        plain = logits(model, IDS)
        model.base_model.enable_adapter_layers()
        close(logits(model, IDS), adapted)
        model.base_model.merge_adapter()
        close(logits(model, IDS), adapted)
        model.base_model.unmerge_adapter()
        close(logits(model.base_model.merge_and_unload(), IDS), adapted)
        models.append((adapted, plain))
    for ours, truth in zip(*models, strict=True):
        close(ours, truth)
    assert (models[0][0] - models[0][1]).abs().max() > 1e-3


def test_options_of_peft_for_loading(base, adapters):
    defaults = {"config": None, "revision": None, "subfolder": None, "token": None}
    model = compat.PeftModel.from_pretrained(base(), adapters / "a", **defaults)
    for option, message in (
        ({"revision": "main"}, "from_pretrained: revision is not supported; leave it out"),
        ({"subfoldr": None}, "unknown option 'subfoldr' .did you mean 'subfolder'"),
    ):
        with pytest.raises(lk.LorakitError, match=message):
            compat.PeftModel.from_pretrained(base(), adapters / "a", **option)
    assert compat.get_peft_model_state_dict(model, None, "default")
    with pytest.raises(lk.LorakitError, match="the model's own state_dict is taken"):
        compat.get_peft_model_state_dict(model, {})
    lists = {key: [1.0] for key in compat.get_peft_model_state_dict(model)}
    with pytest.raises(lk.LorakitError, match="is no tensor but a list"):
        compat.set_peft_model_state_dict(model, lists)


def test_configs_of_other_types_and_their_files(tmp_path):
    config = compat.LoraConfig(
        target_modules=("q_proj",), modules_to_save={"lm_head"}, layers_to_transform=range(1)
    )
    assert (config.modules_to_save, config.layers_to_transform) == (["lm_head"], [0])
    config.save_pretrained(tmp_path)
    assert compat.LoraConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    read = peft.LoraConfig.from_pretrained(tmp_path)
    assert (read.target_modules, read.layers_to_transform) == ({"q_proj"}, [0])


def test_options_that_a_kind_of_combination_does_not_know(theirs, adapters):
    model = compat.PeftModel.from_pretrained(theirs, adapters / "a", "a")
    model.load_adapter(adapters / "b", "b")
    for kind in ("cat", "svd"):
        model.add_weighted_adapter(["a", "b"], [1.0, 0.5], kind, kind, svd_rank=3, density=0.5)
    assert set(model.peft_config) == {"a", "b", "cat", "svd"}


def test_a_beam_is_a_row(theirs, adapters):
    truth = peft.PeftModel.from_pretrained(theirs, adapters / "a", "a").eval()
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    expected = truth.generate(input_ids=IDS, adapter_names=["a", "__base__"], **options)
    ours = compat.PeftModel.from_pretrained(
        tiny_llama(num_key_value_heads=2, vocab_size=300), adapters / "a", "a"
    )
    found = ours.generate(input_ids=IDS, adapter_names=["a", "__base__"], **options)
    assert torch.equal(found, expected)
