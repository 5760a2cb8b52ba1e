"""Adapters on embeddings, saved modules and layers that do more than multiply: against PEFT where
it does the same, and refused where neither knows what to do.
"""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import lorakit as lk
from lorakit.adapters.manage import attached
from tests.adapters.test_attached import CLOSE, filled
from tests.adapters.test_peft_files import hugging_face
from tests.conftest import tiny

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


# ---- embeddings ----


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["shared"]},
        {"target_modules": ["q"], "trainable_token_indices": {"shared": [3, 5]}},
        {"target_modules": ["q"], "modules_to_save": ["shared"]},
    ],
    ids=["LoRA", "rows", "whole"],
)
def test_one_weight_of_several_embeddings(t5, options):
    """Of which only the named one would change."""
    config = lk.LoraConfig(r=2, ensure_weight_tying=True, **options)
    with pytest.raises(lk.LorakitError, match="is another embedding with the same weight"):
        lk.attach(copy.deepcopy(t5), config)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["0", "1"]},
        {"target_modules": ["1"], "modules_to_save": ["0"]},
    ],
)
def test_rows_of_what_is_adapted_already(options):
    module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    config = lk.LoraConfig(r=2, trainable_token_indices=[3], **options)
    with pytest.raises(lk.LorakitError, match="0 is among target_modules or modules_to_save too"):
        lk.attach(module, config)
    assert not lk.adapter_names(module)


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, ids):
        return super().forward(ids) * 3.0


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("padding_idx", [0, 8])
def test_padding_learns_nothing_and_all_else_does(kind, padding_idx):
    """The padding token alone: not what lies in its place among the trained rows."""
    ids = torch.tensor([[0, 3, 5, 8]])
    others = [i for i in ids[0].tolist() if i != padding_idx]

    torch.manual_seed(0)
    module = nn.Sequential(kind(9, 4, padding_idx=padding_idx))
    filled(lk.attach(module, lk.LoraConfig(r=2, target_modules=["0"])))
    module(ids).sum().backward()
    grad = module[0].lora_A.grad
    assert not grad[:, padding_idx].any()
    assert grad[:, others].all()

    module = nn.Sequential(kind(9, 4, padding_idx=padding_idx))
    module.append(nn.Linear(4, 4))
    config = lk.LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [3, 5, 0, 8]})
    lk.attach(module, config)
    module(ids).sum().backward()
    [rows] = [p.rows for p in module[0].adapters.values()]
    zero = rows.grad.abs().sum(1) == 0
    assert zero.tolist() == [i == padding_idx for i in (3, 5, 0, 8)]


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "rows"])
def test_the_weight_of_an_adapted_embedding(kind):
    """For code that uses it as a head: adapted, and with the gradients of both uses."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.out = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, ids):
            return F.linear(self.out(self.emb(ids)), self.emb.weight)

    torch.manual_seed(0)
    module = Tied()
    plain = copy.deepcopy(module)
    options = {"target_modules": ["emb"], "use_dora": kind == "DoRA"}
    if kind == "rows":
        options = {"target_modules": ["out"], "trainable_token_indices": {"emb": [3, 5]}}
    filled(lk.attach(module, lk.LoraConfig(r=2, **options)))
    weight = lk.merge_and_unload(copy.deepcopy(module)).emb.weight
    torch.testing.assert_close(module.emb.weight, weight, **CLOSE)
    with torch.no_grad():
        plain.emb.weight.copy_(weight)
    if kind != "rows":
        torch.testing.assert_close(module(IDS % 9), plain(IDS % 9), **CLOSE)
    module(IDS % 9).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    if kind == "LoRA":  # dL/dA = s (dL/dW B)^T, of a W that is used twice
        plain(IDS % 9).square().sum().backward()
        # sums of 4 x 9 products of gradients up to 100, in another order
        truth = 4 * (plain.emb.weight.grad @ module.emb.lora_B).t()
        torch.testing.assert_close(module.emb.lora_A.grad, truth, rtol=1e-4, atol=1e-3)


def test_autocast_leaves_an_adapted_embedding_as_precise_as_it_is():
    module = nn.Sequential(nn.Embedding(9, 4))
    filled(lk.attach(module, lk.LoraConfig(r=2, target_modules=["0"])))
    truth = module(IDS % 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(IDS % 9), truth)


@pytest.mark.parametrize("rows", [False, True])
def test_a_base_that_trains_under_a_tied_head(tiny_dir, rows):
    """The head's part of its gradient would be missing."""

    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    if rows:
        options |= {"target_modules": ["q_proj"], "trainable_token_indices": [3]}
    model = lk.attach(tiny("llama", tie_word_embeddings=True), lk.LoraConfig(r=2, **options))
    model(IDS)
    model.requires_grad_(True)
    with pytest.raises(lk.LorakitError, match="a head is tied to it: .* freeze it"):
        model(IDS)


def test_a_file_of_an_embedding_that_was_not_tied(tmp_path):
    """PEFT ties nothing in GPT-2, whatever ensure_weight_tying says; here both would change."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    options = {"r": 2, "target_modules": ["wte", "c_fc"], "fan_in_fan_out": True}
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(ensure_weight_tying=True, **options)
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(lk.LorakitError, match="wte is adapted, and lm_head, which has its weight"):
        lk.load_adapter(model, tmp_path)
    assert not lk.adapter_names(model)


# ---- what is trained whole ----


class Twice(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.l, self.l2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.l2.weight = self.l.weight

    def forward(self, x):
        return self.l2(self.l(x))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), Twice()

    def forward(self, x):
        return self.head(self.bn(self.a(x)))


def trained(model, x):
    model.train()
    for _ in range(20):
        model(x)
    return model.eval()


def test_a_saved_module_has_its_buffers_and_all_its_names(tmp_path):
    torch.manual_seed(0)
    plain, x = Normed(), torch.randn(16, 8)
    options = {"r": 2, "target_modules": ["a"], "modules_to_save": ["bn", "head"]}
    ours = filled(lk.attach(copy.deepcopy(plain), lk.LoraConfig(**options)))
    theirs = filled(peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**options)))
    lk.save_adapter(trained(ours, x), tmp_path / "ours")
    trained(theirs, x).save_pretrained(tmp_path / "theirs")
    for folder, truth in (("ours", ours), ("theirs", theirs)):
        mine = lk.load_adapter(copy.deepcopy(plain), tmp_path / folder).eval()
        torch.testing.assert_close(mine(x), truth(x), **CLOSE)
        other = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / folder).eval()
        torch.testing.assert_close(other(x), truth(x), **CLOSE)
    ours.bn.running_var[0] = float("nan")
    with pytest.raises(lk.LorakitError, match="the merged weight of bn holds NaN"):
        lk.merge(ours)


@pytest.mark.parametrize(
    "config",
    [lk.LoraConfig(r=2), lk.IA3Config(target_modules="all-linear", feedforward_modules=[])],
)
def test_layers_in_what_another_adapter_trains_whole(config):
    module = nn.ModuleDict(
        {"mlp": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "q": nn.Linear(8, 8)}
    )
    lk.attach(module, lk.LoraConfig(r=2, target_modules=["q"], modules_to_save=["mlp"]), name="a")
    with pytest.raises(lk.LorakitError, match=r"mlp\.0 lies in a module that another adapter"):
        lk.attach(module, config, name="b")
    assert lk.adapter_names(module) == ["a"]
    lk.attach(module, lk.LoraConfig(r=2, exclude_modules=["0", "1"]), name="b")
    assert [n for n, each in attached(module).items() if "b" in each.adapters] == ["q"]


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))
        self.proj = nn.Linear(8, 8) if inner else None

    def forward(self, x):
        return (x if self.proj is None else self.proj(x)) + self.bias


def test_biases_that_belong_to_no_weight(tmp_path):
    module = nn.ModuleDict({"out": nn.Linear(8, 3), "blk": Block(True)})
    with pytest.raises(lk.LorakitError, match="blk has a bias of its own beside the modules in it"):
        lk.attach(module, lk.LoraConfig(target_modules=["proj"], bias="all"))
    plain = nn.Sequential(nn.Linear(8, 8), Block(False))
    ours = filled(lk.attach(copy.deepcopy(plain), lk.LoraConfig(target_modules=["0"], bias="all")))
    lk.save_adapter(ours, tmp_path)
    x = torch.randn(3, 8)
    torch.testing.assert_close(lk.load_adapter(plain, tmp_path)(x), ours(x), **CLOSE)
    truth = ours(x)
    torch.testing.assert_close(lk.merge_and_unload(ours)(x), truth, **CLOSE)


# ---- which layers ----


def test_whole_names_stay_whatever_the_layers(tmp_path, tiny_dir):
    """PEFT's rule: layers_to_transform is not asked about a layer that is named whole."""
    options = {"r": 2, "target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}
    theirs = peft.get_peft_model(hugging_face(tiny_dir), peft.LoraConfig(**options)).eval()
    filled(theirs).save_pretrained(tmp_path)
    model = lk.load_adapter(lk.load_model(tiny_dir, dtype="float32"), tmp_path)
    assert sorted(attached(model)) == ["lm_head", "model.layers.1.self_attn.q_proj"]
    # of logits up to 3, through two layers: fp32 sums in another order
    assert (model(IDS) - theirs(IDS).logits).abs().max() < 1e-4


# ---- layers that are more than a product ----


def test_a_layer_with_hooks_is_called():
    torch.manual_seed(0)
    module, seen = nn.Sequential(nn.Linear(8, 8)), []
    module[0].register_forward_hook(lambda *_: seen.append(1))
    module[0].register_forward_pre_hook(lambda _, args: (2 * args[0],))
    filled(lk.attach(module, lk.LoraConfig(r=2, lora_alpha=2)))
    x = torch.randn(2, 3, 8)
    truth = module[0].original(x) + x @ module[0].lora_A.t() @ module[0].lora_B.t()
    seen.clear()
    torch.testing.assert_close(module(x), truth, **CLOSE)
    assert seen == [1]


def test_a_forward_of_its_own():
    module = nn.Sequential(nn.Linear(8, 8))
    forward = module[0].forward
    module[0].forward = lambda x: 100 * forward(x)
    x = torch.randn(3, 8)
    truth = module(x)
    torch.testing.assert_close(lk.attach(module, lk.LoraConfig(r=2))(x), truth, **CLOSE)


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("kind", ["pruned", "weight_norm"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_a_weight_that_is_computed(kind, rows):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8))
    if kind == "pruned":
        prune.l1_unstructured(plain[0], "weight", 0.5)
    else:
        nn.utils.weight_norm(plain[0])
    x = torch.randn(rows, 8)
    module = lk.attach(plain, lk.LoraConfig(r=2, target_modules=["0"]))
    filled(module)
    truth = module[0].original(x) + 4 * x @ module[0].lora_A.t() @ module[0].lora_B.t()
    torch.testing.assert_close(module(x), truth, **CLOSE)
    torch.testing.assert_close(lk.merge_and_unload(module)(x), truth, **CLOSE)


def test_ia3_on_layers_whose_weight_is_read(t5, tmp_path):
    options = {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}
    theirs = peft.get_peft_model(copy.deepcopy(t5), peft.IA3Config(**options)).eval()
    filled(theirs).save_pretrained(tmp_path)
    ours = lk.load_adapter(copy.deepcopy(t5), tmp_path)
    truth = theirs(input_ids=IDS, labels=IDS).logits
    torch.testing.assert_close(ours(input_ids=IDS, labels=IDS).logits, truth, **CLOSE)


# ---- inside a block ----


def test_nothing_is_attached_or_deleted_inside_a_block():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    lk.attach(module, lk.LoraConfig(r=2, target_modules=["0"]), name="a")
    for block in (lk.disable_adapters(module), lk.adapter_rows(module, ["a", None])):
        with block:
            with pytest.raises(lk.LorakitError, match="attach: the adapters are disabled, or dif"):
                lk.attach(module, lk.LoraConfig(r=2), name="b")
            with pytest.raises(lk.LorakitError, match="delete_adapter: the adapters are disabled"):
                lk.delete_adapter(module, "a")
    assert lk.adapter_names(module) == ["a"]


@pytest.mark.parametrize("names", [None, 3, "a"])
def test_rows_that_are_no_list(names):
    module = lk.attach(nn.Sequential(nn.Linear(8, 8)), lk.LoraConfig(r=2), name="a")
    with (
        pytest.raises(lk.LorakitError, match="names must be a list of names and None"),
        lk.adapter_rows(module, names),
    ):
        pass


@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"modules_to_save": ["1"]}], ids=["biases", "whole"]
)
def test_what_another_adapter_trains_as_it_is_is_not_left_out(options):
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    lk.attach(module, lk.LoraConfig(r=2, target_modules=["0"], **options), name="a")
    for target in ("all-linear", ["1"], ".*1"):
        with pytest.raises(lk.LorakitError, match="1 is a .* of another adapter"):
            lk.attach(module, lk.LoraConfig(r=2, target_modules=target), name="b")
    assert lk.adapter_names(module) == ["a"]


# ---- what was read from elsewhere ----


def test_a_merge_is_not_taken_back_by_a_forward_of_its_own():
    """accelerate puts such a forward on every layer that it moves."""
    for module, options in (
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"target_modules": ["0"]}),
        (nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8)), {"target_modules": ["0"]}),
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"target_modules": ["1"], "bias": "all"}),
    ):
        forward = module[0].forward
        module[0].forward = forward
        lk.attach(module, lk.LoraConfig(r=2, **options))
        with pytest.raises(lk.LorakitError, match="merge: 0 has a forward of its own"):
            lk.merge(module)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
@pytest.mark.parametrize("features", [8, 12])
def test_hooks_on_a_transposed_layer(options, features, tmp_path):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    plain = nn.Sequential(Conv1D(features, 8))
    nn.init.normal_(plain[0].weight)
    plain[0].register_forward_hook(lambda *_: None)
    options = {"r": 2, "target_modules": ["0"], "fan_in_fan_out": True, **options}
    theirs = filled(peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**options)))
    theirs.save_pretrained(tmp_path)
    ours, x = lk.load_adapter(plain, tmp_path), torch.randn(3, 8)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    lk.merge(ours)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_the_classifier_that_peft_names_and_a_model_has_not(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    plain = LlamaForSequenceClassification(config).eval()
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**options)).eval()
    filled(theirs).save_pretrained(tmp_path)
    ours = lk.load_adapter(plain, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, **CLOSE)


@pytest.mark.parametrize("kind", ["olora", "pissa"])
def test_a_start_that_was_taken_out_of_the_head(kind, tmp_path):
    """PEFT adds the head's weight without it to the file."""
    options = {"r": 4, "target_modules": ["lm_head", "q_proj"], "init_lora_weights": kind}
    plain = tiny("llama", tie_word_embeddings=False)
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**options)).eval()
    filled(theirs).save_pretrained(tmp_path)
    ours = lk.load_adapter(plain, tmp_path)
    # the start is a decomposition in fp32, made twice
    assert (ours(IDS).logits - theirs(IDS).logits).abs().max() < 1e-3


def test_lists_of_modules_are_not_called():
    module = nn.ModuleDict({"q": nn.Linear(8, 8), "mlp": nn.ModuleList([nn.Linear(8, 8)])})
    with pytest.raises(lk.LorakitError, match="mlp only holds modules, and is not called"):
        lk.attach(module, lk.LoraConfig(target_modules=["q"], modules_to_save=["mlp"]))


def test_arguments_of_other_libraries():
    with pytest.raises(lk.LorakitError, match="a module of torch is wanted, not None"):
        lk.attach(None, lk.LoraConfig())
    with pytest.raises(
        lk.LorakitError, match="peft.*LoraConfig is no adapter's config of lorakit's"
    ):
        lk.attach(nn.Linear(8, 8), peft.LoraConfig())
    with pytest.raises(lk.LorakitError, match="init_lora_weights is .* N a whole number up to 10"):
        lk.LoraConfig(init_lora_weights="pissa_niter_99999999999")


def test_paths_of_another_kind(tmp_path):
    module = nn.Sequential(nn.Linear(8, 8))
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(lk.LorakitError, match="adapter_config.json is no file"):
        lk.load_adapter(module, tmp_path)
    lk.attach(module, lk.LoraConfig(r=2))
    (tmp_path / "file").touch()
    with pytest.raises(lk.LorakitError, match="file is a file; a directory is wanted"):
        lk.save_adapter(module, tmp_path / "file")
    lk.save_adapter(module, tmp_path / "bin")
    (tmp_path / "bin" / "adapter_model.safetensors").rename(tmp_path / "bin" / "adapter_model.bin")
    with pytest.raises(lk.LorakitError, match="is pickled, which is not read"):
        lk.load_adapter(nn.Sequential(nn.Linear(8, 8)), tmp_path / "bin")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_tensors_that_are_no_weights(tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    lk.save_adapter(lk.attach(nn.Sequential(nn.Linear(8, 8)), lk.LoraConfig(r=2)), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(path).items()}, path)
    module = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(lk.LorakitError, match=r"lora_A\.weight is of torch\."):
        lk.load_adapter(module, tmp_path)
    assert not lk.adapter_names(module)
