"""A QLoRA step on a GPU as each provider takes it, and the rows that it learns from.

A step is forward, backward, clipping of the gradient and AdamW, with adapters of rank 16 on all
linear layers of a random decoder in NF4; embedding and head are dense. Rows are of two kinds
(`sides.py` joins and pads):

    dense     one row, labels on all of its tokens
    packed    ragged rows, labels on the last 40 % of each; lorakit joins them in one row, the
              others pad them to the longest, which is 45 % of padding

`lorakit graph` is the step of a run that packs on a GPU: one CUDA graph (training/captured.py).
The peers are transformers, PEFT and bitsandbytes; the same with Liger's kernels in the place of
transformers' code; and unsloth. The last two change transformers for the whole process, so that
each needs a process of its own (gpu.py starts it).
"""

import itertools
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from cases import OURS, RANK, SCALING, Setting, mixed_precision, with_peft
from sides import IGNORE, Rows, joined, padded
from torch import Tensor, nn

import lorakit as lk
import lorakit.data.encode
import lorakit.models.decoder  # the decoder itself: load_model would want a file
import lorakit.training.captured
import lorakit.training.device_step  # as a run clips and steps
import lorakit.training.float8
import lorakit.training.trainable

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = ("dense", "packed")  # of rows
RATE, MAX_NORM = 1e-3, 1.0
# Of packed rows: the share of labels, the share of a padded batch that is real, the mean length.
LABELS, FILLED, MEAN = 0.4, 0.55, 256


@dataclass
class Step:
    """A step of one provider; a call runs it."""

    loss: Callable[[], Tensor]  # the mean over the labels, on the device
    optimizer: torch.optim.Optimizer
    update: Callable[[Tensor], object]  # clips, and lets the optimizer step; of the loss [1]
    around: Callable[[], AbstractContextManager] = nullcontext

    def __call__(self) -> None:
        with self.around():
            loss = self.loss()
            loss.backward()
            self.update(loss.detach().view(1))
        self.optimizer.zero_grad(set_to_none=True)


@dataclass
class GraphStep(Step):
    """A step that `take` takes as a whole, its loss and backward too."""

    take: Callable[[], object] = lambda: None

    def __call__(self) -> None:
        with self.around():
            self.take()
        self.optimizer.zero_grad(set_to_none=True)


# ---- rows ---------------------------------------------------------------------------------------


def packed_lengths(tokens: int) -> list[int]:
    """Return the lengths of ragged rows, `tokens` in all; padded to the longest, FILLED are real.

    They lie at equal distances, the longest ten times the shortest.
    """
    n = max(2, tokens // MEAN)
    longest, shortest = tokens / n / FILLED, (2 * FILLED - 1) * tokens / n / FILLED
    ends = [shortest + (longest - shortest) * i / (n - 1) for i in range(n)]
    sums = [round(x) for x in itertools.accumulate(ends)]
    lengths = [b - a for a, b in itertools.pairwise([0, *sums])]
    random.Random(0).shuffle(lengths)
    return lengths


def make_rows(kind: str, tokens: int, vocabulary: int) -> Rows:
    """Return rows of random ids, `tokens` in all, of one of the KINDS."""
    rng = random.Random(0)
    rows = []
    for length in [tokens] if kind == "dense" else packed_lengths(tokens):
        ids = [rng.randrange(vocabulary) for _ in range(length)]
        prompt = 0 if kind == "dense" else length - max(1, round(LABELS * length))
        rows.append((ids, [IGNORE] * prompt + ids[prompt:]))
    return rows


# ---- lorakit ------------------------------------------------------------------------------------


def decoder(s: Setting, layers: int, config: lk.ModelConfig | None = None) -> nn.Module:
    """Return lorakit's, random, packed, with adapters; without a config a Llama of the sizes."""
    n = s.sizes
    if config is None:
        config = lk.ModelConfig(
            "llama", n.vocabularies[0], n.hidden, n.inner, layers, n.heads, n.kv_heads, n.head_dim
        )
    with torch.device("meta"):
        model = lorakit.models.decoder.Decoder(config)
    model = model.to(s.dtype).to_empty(device=s.device).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1)
    adapters = lk.LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK))
    return lk.attach(lk.quantize(model), adapters).train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def our_loss(s: Setting, model: nn.Module, rows: Rows) -> Callable[[], Tensor]:
    """Labels and bounds stay in host memory, as a run has them."""
    ids, labels = joined(rows)
    ids, bounds = ids.to(s.device), None
    if len(rows) > 1:
        bounds = torch.tensor([0, *itertools.accumulate(len(row) for row, _ in rows)])

    def loss() -> Tensor:
        total, count = model.loss(ids, labels, cu_seqlens=bounds)
        return total / count

    return loss


def our_step(
    s: Setting, layers: int, rows: Rows, backend: str, checkpointing: bool = False,
    kept_layers: int | None = None, float8: bool = False, config: lk.ModelConfig | None = None,
) -> Step:  # fmt: skip
    """kept_layers: how many keep gate and up for backward; None: all."""
    model = decoder(s, layers, config)
    model.gradient_checkpointing = checkpointing
    model.kept_layers = layers if kept_layers is None else kept_layers
    if float8:
        lorakit.training.float8.start_float8(model)
    optimizer = lk.optim.AdamW(trained(model))
    around = partial(lk.kernels.use_backend, backend)
    with around():
        made = lorakit.training.device_step.optimizer_step
        update = made(optimizer, trained(model), [[RATE]] * 1000, MAX_NORM)
    return Step(our_loss(s, model, rows), optimizer, update, around)


# ---- the peers ----------------------------------------------------------------------------------


def llama(s: Setting, layers: int):
    """Return transformers' config of the same shape."""
    from transformers import LlamaConfig

    n = s.sizes
    return LlamaConfig(
        vocab_size=n.vocabularies[0], hidden_size=n.hidden, intermediate_size=n.inner,
        num_hidden_layers=layers, num_attention_heads=n.heads, num_key_value_heads=n.kv_heads,
        head_dim=n.head_dim, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def peers_loss(s: Setting, model: nn.Module, rows: Rows) -> Callable[[], Tensor]:
    ids, labels, real = (t.to(s.device) for t in padded(rows))
    inputs = {"input_ids": ids, "labels": labels}
    if len(rows) > 1:
        inputs["attention_mask"] = real

    def loss() -> Tensor:
        with mixed_precision(s.device, s.dtype):
            return model(**inputs).loss

    return loss


def peers_step(s: Setting, model: nn.Module, rows: Rows) -> Step:
    """A step with torch's clipping and its fused AdamW."""
    params = trained(model)
    optimizer = torch.optim.AdamW(params, lr=RATE, fused=True)

    def update(loss: Tensor) -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return Step(peers_loss(s, model, rows), optimizer, update)


def peft_step(s: Setting, layers: int, rows: Rows) -> Step:
    from transformers import AutoModelForCausalLM

    with torch.device(s.device):
        model = AutoModelForCausalLM.from_config(llama(s, layers), dtype=s.dtype)
    model = with_peft(model.requires_grad_(False), PROJECTIONS).train()
    return peers_step(s, model, rows)


def liger_step(s: Setting, layers: int, rows: Rows) -> Step:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return peft_step(s, layers, rows)


def unsloth_step(s: Setting, layers: int, rows: Rows) -> Step:
    """unsloth loads from a directory, so that one is written first, with a tokenizer of a word."""
    from unsloth import FastLanguageModel  # isort: skip  # before transformers, which it changes
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as folder:
        with torch.device(s.device):
            model = AutoModelForCausalLM.from_config(llama(s, layers), dtype=s.dtype)
        model.save_pretrained(folder)
        del model
        write_tokenizer(folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=sum(len(ids) for ids, _ in rows), dtype=s.dtype,
            load_in_4bit=True,
        )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=int(SCALING * RANK), lora_dropout=0, bias="none",
        target_modules=PROJECTIONS, use_gradient_checkpointing=False,
    )  # fmt: skip
    model.train()
    return peers_step(s, model, rows)


def write_tokenizer(folder: str | Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


# what a step's provider is called -> how its step is made, of (setting, layers, rows)
def graph_step(s: Setting, layers: int, rows: Rows) -> Step:
    """Return the step as a run takes rows that it packs: recorded, and replayed on new inputs."""
    captured = lorakit.training.captured
    model = decoder(s, layers)
    optimizer = lk.optim.AdamW(trained(model))
    made = lorakit.training.device_step.optimizer_step
    update = made(optimizer, trained(model), [[RATE]] * 1000, MAX_NORM)
    examples = [lorakit.data.encode.Example(*row) for row in rows]
    order = SimpleNamespace(packs=[range(len(rows))], lengths=[len(ids) for ids, _ in rows])
    config = lk.TrainConfig(packing=True)
    recorder = captured.CudaGraphs(torch.device(s.device))
    adapted = lorakit.training.trainable.trainable_layers(model)
    step = captured.CapturedStep(model, adapted, order, config, update, recorder, print)
    count = sum(label != IGNORE for _, labels in rows for label in labels[1:])
    loss = our_loss(s, model, rows)
    return GraphStep(loss, optimizer, update, take=lambda: step(step.prepare(1, [examples], count)))


PROVIDERS: dict[str, Callable[[Setting, int, Rows], Step]] = {
    **{f"lorakit {name}": partial(our_step, backend=name) for name in OURS},
    "lorakit graph": graph_step,
    "PEFT, bitsandbytes": peft_step,
    "PEFT, Liger": liger_step,
    "unsloth": unsloth_step,
}
# those that change transformers, and the packages that they need beside PEFT's
ALONE = {
    "PEFT, Liger": ("peft", "bitsandbytes", "liger_kernel"),
    "unsloth": ("unsloth",),
}
