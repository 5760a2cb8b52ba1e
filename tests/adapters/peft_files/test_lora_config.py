"""adapter_config.json of LoRA: names, ranks and alphas that mean the same to every reader."""

import json

import peft
import pytest
import torch

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from tests.adapters.common import IDS, edit_config, filled, hugging_face, nested, randomize
from tests.adapters.peft_files.adapters_of_peft import LOGITS
from tests.conftest import tiny


@pytest.mark.parametrize(
    "config",
    [
        lk.LoraConfig(r=2, target_modules="0"),
        lk.LoraConfig(r=2, target_modules=["0", "1.1"], exclude_modules=["1.0"]),
        # of all three, with other ranks in the order in which the first match counts
        lk.LoraConfig(r=2, target_modules=["0", "1"], rank_pattern={"1.0": 3, "0": 4}),
        lk.LoraConfig(r=2, target_modules=["0", "1"], alpha_pattern={"1.0": 3, "0": 4}),
    ],
    ids=["regex", "exclude", "ranks", "alphas"],
)
def test_a_name_in_which_another_one_ends(tmp_path, config):
    """`0` is also how `1.0` ends: what is read is the same all the same, here and in PEFT."""
    from peft import PeftModel

    module, x = nested(), torch.randn(3, 8)
    randomize(lk.attach(module, config))
    lk.save_adapter(module, tmp_path)
    again = lk.load_adapter(nested(), tmp_path)
    assert lora_layers(again).keys() == lora_layers(module).keys()
    assert torch.equal(again(x), module(x))
    edit_config(tmp_path, task_type=None)  # a PeftModelForCausalLM asks for methods of such a model
    theirs = PeftModel.from_pretrained(nested(), tmp_path).eval()
    # fp32 sums of 8 products in another order, through three layers
    assert (theirs(x) - module(x)).abs().max() < 1e-5
    lk.save_adapter(again, tmp_path / "again")
    assert torch.equal(lk.load_adapter(nested(), tmp_path / "again")(x), module(x))


def test_a_tied_head_of_any_name_has_no_rank_of_its_own(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.fc = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 8)
            self.output = torch.nn.Linear(8, 20, bias=False)
            self.output.weight = self.embed.weight

        def forward(self, ids):
            return self.output(self.fc(self.embed(ids)))

    config = lk.LoraConfig(
        r=4, target_modules=["embed", "fc"], rank_pattern={"embed": 2}, ensure_weight_tying=True
    )
    module, ids = randomize(lk.attach(Model(), config)), torch.arange(20)[None]
    lk.save_adapter(module, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["rank_pattern"] == {"embed": 2, "output": 2}  # PEFT adapts it as one of its own
    again = lk.load_adapter(Model(), tmp_path)
    assert torch.equal(again(ids), module(ids))
    twice = lk.load_adapter(module, tmp_path, name="twice")  # where the head is one of ours by now
    assert torch.equal(again(ids), twice(ids))


@pytest.mark.parametrize("parameters", [None, ["v_proj.weight"]])
def test_what_a_file_leaves_out_is_as_peft_has_it(model, tiny_dir, tmp_path, parameters):
    """A rank and an alpha that are not said are PEFT's defaults, which are not lorakit's."""
    base = hugging_face(tiny_dir)
    options = {"target_modules": ["q_proj"], "target_parameters": parameters}
    filled(peft.get_peft_model(base, peft.LoraConfig(**options))).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    said = json.loads(file.read_text())
    assert (said.pop("r"), said.pop("lora_alpha")) == (8, 8)
    file.write_text(json.dumps(said))
    theirs = peft.PeftModel.from_pretrained(hugging_face(tiny_dir), tmp_path).eval()
    lk.load_adapter(model, tmp_path)
    assert (model(IDS) - theirs(IDS).logits).abs().max() <= LOGITS
    assert {layer.alpha for layer in lk.describe_adapter(tmp_path).layers} == {8}


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_head_that_was_trained_apart_is_named(tmp_path, whole):
    """PEFT copies both modules, which are one weight no more; the base has room for one."""
    base = tmp_path / "base"
    tiny("llama", tie_word_embeddings=True).save_pretrained(base)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=whole)
    theirs = peft.get_peft_model(hugging_face(base), config)
    filled(theirs).save_pretrained(tmp_path / "a")
    with pytest.raises(lk.LorakitError, match="lm_head was trained whole and apart"):
        lk.load_adapter(lk.load_model(base, dtype="float32"), tmp_path / "a")


def test_modules_to_save_by_any_end_of_their_names(model, tiny_dir, tmp_path):
    """PEFT takes "norm" for the layernorms too, lorakit for the last norm alone; each reads what
    the other wrote.
    """
    import peft

    options = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    theirs = peft.get_peft_model(hugging_face(tiny_dir), peft.LoraConfig(**options)).eval()
    torch.manual_seed(0)
    filled(theirs).save_pretrained(tmp_path / "theirs")
    lk.load_adapter(model, tmp_path / "theirs", name="theirs")
    assert (model(IDS) - theirs(IDS).logits).abs().max() <= LOGITS

    filled(lk.attach(model, lk.LoraConfig(**options), name="ours"))
    lk.save_adapter(model, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["model.norm"]
    again = peft.PeftModel.from_pretrained(hugging_face(tiny_dir), tmp_path / "ours").eval()
    assert (model(IDS) - again(IDS).logits).abs().max() <= LOGITS


@pytest.mark.parametrize(
    ("options", "alpha", "pattern"),
    [
        ({"lora_alpha": 16.0}, "16", "{}"),
        ({"lora_alpha": 0.5}, "0.5", "{}"),
        ({"lora_alpha": 16.0, "init_lora_weights": "pissa"}, "32", "{}"),
        ({"lora_alpha": 16, "init_lora_weights": "pissa", "use_rslora": True}, "64", "{}"),
        (
            {
                "lora_alpha": 16,
                "alpha_pattern": {"v_proj": 4},
                "init_lora_weights": "pissa",
                "use_rslora": True,
            },
            "64",
            '{"model.layers.0.self_attn.v_proj": 16, "model.layers.1.self_attn.v_proj": 16}',
        ),
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 4.0}}, "8", '{"q_proj": 4}'),
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 4.5}}, "8", '{"q_proj": 4.5}'),
    ],
)
def test_a_whole_alpha_is_written_without_a_point(
    model, tiny_dir, tmp_path, options, alpha, pattern
):
    """vLLM and Ollama read lora_alpha as an integer (ollama/ollama#17377).

    PiSSA is saved at twice the rank, and with rsLoRA its alpha would grow by the root of 2.
    """
    lk.attach(model, lk.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
    lk.save_adapter(model, tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert json.dumps(values["lora_alpha"]) == alpha
    assert json.dumps(values.get("alpha_pattern", {})) == pattern
    again = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), tmp_path)
    assert (again(IDS) - model(IDS)).abs().max() <= LOGITS


def test_an_alpha_that_is_no_whole_number_is_named(model, tmp_path, caplog):
    """The root of r = 8 is not whole, so neither is an alpha with or without rsLoRA."""
    options = {"init_lora_weights": "pissa", "use_rslora": True}
    lk.attach(model, lk.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], **options))
    lk.save_adapter(model, tmp_path / "in")
    written = json.loads((tmp_path / "in" / "adapter_config.json").read_text())
    assert (written["use_rslora"], written["r"]) == (True, 16)
    assert f"lora_alpha is {written['lora_alpha']}, and some servers read whole" in caplog.text
    assert lk.convert_adapter(tmp_path / "in", tmp_path / "out").lora_alpha == 16


@pytest.mark.parametrize("decoder", [True, False])
def test_a_lora_bias_on_layers_without_a_bias(tiny_dir, tmp_path, decoder):
    """PEFT computes with it and merges no such adapter; lorakit does the same."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_bias=True)
    theirs = filled(peft.get_peft_model(hugging_face(tiny_dir), config)).eval()
    theirs.save_pretrained(tmp_path)
    plain = lk.load_model(tiny_dir, dtype="float32") if decoder else hugging_face(tiny_dir)
    ours = lk.load_adapter(plain, tmp_path)

    def logits_of(model):
        found = model(IDS)
        return found if isinstance(found, torch.Tensor) else found.logits

    found, truth = logits_of(ours), logits_of(theirs)
    torch.testing.assert_close(found, truth, rtol=0, atol=LOGITS)
    found.square().mean().backward()
    truth.square().mean().backward()
    place = "model.layers.0.mlp.up_proj"
    grad = theirs.get_submodule(f"base_model.model.{place}").lora_B.default.bias.grad
    own = lora_layers(ours)[place].part.lora_bias.grad
    torch.testing.assert_close(own, grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item())
    with pytest.raises(lk.LorakitError, match="q_proj has no bias to add the adapter's lora_bias"):
        lk.merge(ours)
    assert torch.equal(logits_of(ours), found)
