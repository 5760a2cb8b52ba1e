"""What the ranks of a sharded model do in tests: `python -m tests.models.sharded SIZE FOLDER`.

The first process forks the others, which share what it has imported. Each case runs on every rank
and compares with the same model in one piece, which every rank has too; the first rank writes what
became of each case to FOLDER/results.json. A case that fails on one rank may leave the others in a
message that never comes: an alarm ends them.
"""

import datetime
import itertools
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from lorakit.config.quantization import QuantConfig
from lorakit.models import save
from lorakit.models.decoder import Decoder
from lorakit.models.sharding import gathered, mesh_of_one, shard
from lorakit.models.shards import is_sharded, whole
from lorakit.training.resume import digest_of_frozen
from lorakit.training.stepping import run_optimizer
from lorakit.training.trainable import TrainedModel

SECONDS = 240  # that a rank lives
STORAGE = {
    "nf4": QuantConfig(),
    "single": QuantConfig(double_quant=False),
    "int8": QuantConfig(quant_type="int8"),
    "dense": None,
    "embedding": QuantConfig(embed_tokens="nf4"),
}
FORMS = list(itertools.product(STORAGE, (True, False), (False, True), ("float32", "bfloat16")))
FAST = [FORMS[0], FORMS[7], FORMS[22], FORMS[34]]
FAMILIES = ("llama", "qwen3_moe", "gemma3_text", "qwen3_5_text")


def config(tied=False):
    values = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,  # no rank has as many rows as the others
        "tie_word_embeddings": tied,
    }
    return lk.ModelConfig.from_hf(values)


def random_model(storage="dense", tied=False, dtype="float32"):
    torch.manual_seed(0)
    model = Decoder(config(tied)).to(getattr(torch, dtype)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.05) if parameter.dim() > 1 else parameter.fill_(1)
    return model if STORAGE[storage] is None else lk.quantize(model, STORAGE[storage])


def attach(model, **options):
    """Attach LoRA with random values, which are the same whenever it is called."""
    torch.manual_seed(1)
    lk.attach(model, lk.LoraConfig(**{"r": 4, "lora_alpha": 8} | options))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return model.train()


def inputs(packed=False):
    ids = torch.randint(97, (1, 24) if packed else (2, 12), generator=torch.manual_seed(3))
    labels = ids.clone()
    labels[:, ::3] = -100
    return ids, labels, {"cu_seqlens": torch.tensor([0, 9, 24])} if packed else {}


def step(model, packed=False):
    """Return the loss and the gradients, by name, of the second of two steps."""
    ids, labels, where = inputs(packed)
    for _ in range(2):  # the second one meets what the first one left
        torch.manual_seed(4)
        model.zero_grad(set_to_none=True)
        loss, _ = model.loss(ids, labels, **where)
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


def assert_same_steps(many, one, packed=False):
    assert_same(step(many, packed), step(one, packed))
    assert not any(p.grad is not None for p in many.parameters() if is_sharded(p))
    with torch.no_grad():
        ids = inputs()[0]
        assert torch.equal(many.eval()(ids), one.eval()(ids))


def values(model):
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


# ---- the cases ----


def form(mesh, folder, storage, tied, packed, dtype):
    one = attach(random_model(storage, tied, dtype))
    many = attach(shard(random_model(storage, tied, dtype), mesh))
    one.gradient_checkpointing = many.gradient_checkpointing = packed
    assert_same_steps(many, one, packed)


def family(mesh, folder, name):
    """A model from files has the values of one process, and computes what that computes."""
    options = {"dtype": "float32", "quantize": "nf4"}
    one = lk.load_model(folder / name, **options)
    many = lk.load_model(folder / name, mesh=mesh, **options)
    assert_same(values(many), values(one))
    mine = sum(p.to_local().nbytes for p in many.parameters() if is_sharded(p))
    all_of_it = sum(p.nbytes for p in one.parameters())
    # one more row of each parameter at most, and the norms outside of blocks
    rows = sum(p.nbytes // len(p) for p in one.parameters())
    assert mine <= all_of_it / mesh.size() + rows
    assert_same_steps(attach(many), attach(one))


def offloaded(mesh, folder):
    one = attach(random_model("nf4"))
    assert_same_steps(attach(shard(random_model("nf4"), mesh, offload=True)), one)
    alone = lk.load_model(folder / "llama", dtype="float32", offload_weights=True)
    assert_same(values(alone), values(lk.load_model(folder / "llama", dtype="float32")))
    tok = lk.load_tokenizer(folder / "llama")
    # each rank has all weights, and may draw by itself
    lk.generate(alone, tok, "1 + 1", max_new_tokens=1 + distributed.get_rank(), temperature=1.0)


def copies(mesh, folder):
    """Every row of a mesh of two dimensions has all weights."""
    size = mesh.size()
    one = attach(random_model("nf4"))
    for shape in ((size, 1), (1, size)):
        rows = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "ranks"))
        many = shard(random_model("nf4"), rows)
        assert_same_steps(attach(many), one)
    assert mesh_of_one(torch.device("cpu")).ndim == 2


def adapters(mesh, folder, **options):
    """An adapter that starts from the weight, or has a copy of it, starts as on one process."""
    one, many = random_model("nf4"), shard(random_model("nf4"), mesh)
    for model in (one, many):
        attach(model, **options)
    trained = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in (many, one)]
    assert not any(is_sharded(p) for p in trained[0].values())
    assert_same(*trained)
    assert_same_steps(many, one)


def tied_head(mesh, folder):
    """The head of a tied model, adapted by itself, shares the embedding's parts."""
    options = {"target_modules": ["lm_head", "q_proj"]}
    one = attach(random_model(tied=True), **options)
    assert_same_steps(attach(shard(random_model(tied=True), mesh), **options), one)


def loftq(mesh, folder):
    one = attach(lk.load_model(folder / "llama", dtype="float32", quantize="nf4"))
    many = attach(lk.load_model(folder / "llama", dtype="float32", quantize="nf4", mesh=mesh))
    for model in (one, many):
        torch.manual_seed(0)
        lk.loftq(model, iterations=2)  # which quantizes the base again
    assert_same(values(many), values(one))
    assert_same_steps(many, one)


def merged(mesh, folder, base):
    """A merged model's files have the bytes of one process's, and so has what it computes."""
    one, many = (
        attach(lk.load_model(folder / "llama", dtype="float32", quantize="nf4", mesh=each))
        for each in (None, mesh)
    )
    drift = [str(lk.merge(model, base)) for model in (many, one)]
    assert drift[0] == drift[1]
    assert all(is_sharded(each.merged.weight) for each in lora_layers(many).values())
    with torch.no_grad():
        assert torch.equal(many(inputs()[0]), one(inputs()[0]))
    to, packed = folder / f"rank {distributed.get_rank()} {base}", base == "nf4"
    lk.save_model(one, to / "one", packed=packed)
    lk.save_model(many, folder / f"all {base}", packed=packed)
    distributed.barrier()
    files = {p.name: p.read_bytes() for p in (folder / f"all {base}").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (to / "one").iterdir()}
    lk.unmerge(many)
    lk.unmerge(one)
    assert_same_steps(many, one)


def failed_backward(mesh, folder):
    """A backward pass that fails gives the gathered head back."""

    def fail(gradient):
        raise RuntimeError("on purpose")

    many = attach(shard(random_model(), mesh), target_modules=["q_proj", "lm_head"], use_dora=True)
    many.model.norm.register_forward_hook(lambda norm, x, y: y[0].register_hook(fail) and None)
    ids, labels, _ = inputs()
    loss, _ = many.loss(ids, labels)
    try:
        loss.backward()
    except RuntimeError as error:
        assert str(error) == "on purpose"
    else:
        raise AssertionError("the backward pass did not fail")
    assert is_sharded(many.lm_head.base.linear.weight)


def full_disk(mesh, folder):
    """A rank that cannot write takes the parts of the others, which do not wait for it."""
    many = shard(random_model(), mesh)
    full = mock.patch.object(save, "write_safetensors", side_effect=OSError(28, "no space left"))
    with full, suppress(OSError):
        lk.save_model(many, folder / "full disk")
    assert_same(values(many), values(random_model()))


def full_training(mesh, folder):
    """What full training of divided weights refuses."""
    train = lk.TrainConfig(train="full", output_dir=str(folder / "full"))
    offloaded = shard(random_model(), mesh_of_one(torch.device("cpu")))
    refused("without offload_weights", TrainedModel, offloaded, train)
    many = shard(random_model(), mesh)
    refused("does not go with objective: dpo", TrainedModel, many, replace(train, objective="dpo"))
    run_optimizer(TrainedModel(many, train), train)
    if mesh.size() == 2:  # 97 x 64 values are cut at row 49, in the middle of a block
        train = replace(train, optim="adamw_8bit")
        refused("would cut one of", run_optimizer, TrainedModel(many, train), train)


def generated(mesh, folder):
    """Every rank writes the text that one process writes."""
    tok = lk.load_tokenizer(folder / "llama")
    one, many = (lk.load_model(folder / "llama", mesh=each) for each in (None, mesh))
    for options in ({}, {"temperature": 1.0, "seed": 5}):
        with lk.kernels.use_backend("reference"):  # the compiled step rounds otherwise
            texts = [lk.generate(m, tok, "1 + 1", max_new_tokens=8, **options) for m in (many, one)]
        assert texts[0] == texts[1]
    refused("give them one seed", lk.generate, many, tok, "1 + 1", temperature=1.0)


def trained(mesh, folder):
    """A run trains the adapter of a run with whole weights, and goes on from its checkpoint."""
    tok = lk.load_tokenizer(folder / "llama")
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(8)]
    files, digests = [], set()
    for name, steps, each in (("whole", 4, None), ("run", 2, None), ("run", 4, mesh)):
        model = lk.load_model(folder / "llama", quantize="nf4", mesh=each)
        digests.add(digest_of_frozen(model.requires_grad_(False)))
        torch.manual_seed(0)
        lk.attach(model, lk.LoraConfig(r=4))
        options = {"max_steps": steps, "save_steps": 2, "lr_scheduler_type": "constant"}
        options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
        options |= {"output_dir": str(folder / name), "resume": "auto", "eval_steps": 4}
        data = {"train": rows, "validation": rows[:3]}
        result = lk.train(model, tok, data, lk.TrainConfig(**options))
        distributed.barrier()
        adapter = (folder / name / "adapter_model.safetensors").read_bytes()
        files.append((adapter, result.loss, result.evaluations[steps:]))
        distributed.barrier()
    assert len(digests) == 1
    assert files[0] == files[2] != files[1]


def refusals(mesh, folder):
    many = shard(random_model("nf4"), mesh)
    refused("sharded already", shard, many, mesh)
    refused("attach", shard, attach(random_model()), mesh)
    refused("quantize it while it is loaded", lk.quantize, shard(random_model(), mesh))
    refused("give a device or a mesh", lk.load_model, folder / "llama", mesh=mesh, device="cpu")
    ours = {"shard": "auto" if distributed.get_rank() == 0 else "none"}
    run = {"model": str(folder / "llama"), "data": "rows.jsonl"} | ours
    refused("another shard", lk.mesh_of_run, lk.RunConfig.from_dict(run))
    for layer in many.model.layers[0].modules():
        if "absmax" in layer._parameters:
            with gathered(layer):
                assert not any(is_sharded(p) for p in layer.parameters(recurse=False))
            assert all(is_sharded(p) for p in layer.parameters(recurse=False))


def refused(words, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except lk.LorakitError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"{words}: not refused")


CASES = {f"{s} {t} {p} {d}": (form, (s, t, p, d), {}) for s, t, p, d in FORMS}
SLOW = CASES.keys() - {f"{s} {t} {p} {d}" for s, t, p, d in FAST}
SLOW |= {"gemma3_text", "qwen3_5_text", "merged dequantized", "copies", "tokens"}
SLOW |= {"dropout of the head", "qwen3_moe", "merged nf4", "loftq", "generated"}
CASES |= {name: (family, (name,), {}) for name in FAMILIES}
CASES |= {
    "merged dequantized": (merged, ("dequantized",), {}),
    "merged nf4": (merged, ("nf4",), {}),
}
CASES |= {
    function.__name__: (function, (), {})
    for function in (offloaded, copies, tied_head, loftq, generated, trained, refusals)
}
CASES |= {
    function.__name__: (function, (), {})
    for function in (failed_backward, full_disk, full_training)
}
ADAPTERS = {
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"], "bias": "all"},
    "tokens": {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1]}},
    "dropout of the head": {"target_modules": ["lm_head", "q_proj"], "lora_dropout": 0.5},
}
CASES |= {name: (adapters, (), options) for name, options in ADAPTERS.items()}


def main():
    size, folder, which = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    rank = next((i for i in range(1, size) if os.fork() == 0), 0)
    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh, results = init_device_mesh("cpu", (size,)), {}
    for name, (function, arguments, options) in CASES.items():
        if which not in ("fast", "all", name):
            continue
        if which == "fast" and name in SLOW:
            continue
        try:
            function(mesh, folder, *arguments, **options)
            results[name] = "passed"
        except Exception:
            results[name] = f"rank {rank}: {traceback.format_exc()}"
        every = [None] * size
        distributed.all_gather_object(every, results[name])
        results[name] = next((each for each in every if each != "passed"), "passed")
        if rank == 0:
            (folder / "results.json").write_text(json.dumps(results))
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # the others have no tests to end


if __name__ == "__main__":
    main()
