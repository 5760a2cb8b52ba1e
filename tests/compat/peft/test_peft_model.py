"""lorakit.compat.peft against peft: the same calls on the same models."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit as lk
from lorakit.compat import peft as compat
from tests.compat.comparing import IDS, OPTIONS, close, logits, randomize
from tests.conftest import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be contained:UserWarning")


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
