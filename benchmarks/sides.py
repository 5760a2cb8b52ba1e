"""What training.py and load.py measure, on both sides: a QLoRA step, and loading into NF4.

A `Side` is one of them, alone in its process (children.py). The step is written once, here: loss,
backward, clipping of the gradient, AdamW. A side says how it loads a model, adapts it and computes
the mean loss over the label tokens. Weights are NF4 in blocks of 64 with double quantization,
embedding and head dense; adapters are fp32, of rank r and scaling 2 on every linear layer but the
head.

The peer is transformers, PEFT and bitsandbytes with their defaults: fp32 adapters, transformers'
scaled_dot_product_attention; and what transformers' Trainer puts around them: autocast in bf16,
torch's fused AdamW, clipping; without the Trainer's own time. `prepare_model_for_kbit_training` is
left out, to the peer's advantage: it casts norms, embedding and head to fp32, for steps that are
slower and take more memory.

Rows are pairs of token ids and labels, -100 where the loss does not count. They are padded on the
right to the longest, or packed: one after the other in one row, each seeing itself alone.
"""

import json
import random
import sysconfig
import time
from collections.abc import Iterator
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100
LEARNING_RATE, CLIP = 2e-4, 1.0
SHORTEST, LONGEST = 30, 150  # tokens of a ragged row

Rows = list[tuple[list[int], list[int]]]  # token ids and labels of each


def padded(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and where they are real, int64 [B, longest]."""
    longest = max(len(ids) for ids, _ in rows)

    def fill(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    ids = torch.tensor([fill(ids, 0) for ids, _ in rows])
    labels = torch.tensor([fill(labels, IGNORE) for _, labels in rows])
    return ids, labels, torch.tensor([fill([1] * len(ids), 0) for ids, _ in rows])


def joined(rows: Rows) -> tuple[Tensor, Tensor]:
    """Ids and labels, int64 [1, all tokens]."""
    ids, labels = (list(chain.from_iterable(parts)) for parts in zip(*rows, strict=True))
    return torch.tensor([ids]), torch.tensor([labels])


class Side:
    """What both have in common. A subclass imports its libraries when it is made."""

    model: nn.Module
    params: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    def load_model(self, folder: str, dtype: torch.dtype) -> nn.Module:
        """Return the model of a Hugging Face directory, packed."""
        raise NotImplementedError

    def adapted(self, rank: int, checkpointing: bool) -> nn.Module:
        """The model with adapters, ready to train."""
        raise NotImplementedError

    def make_optimizer(self, **options: float) -> torch.optim.Optimizer:
        """AdamW on `self.params`."""
        raise NotImplementedError

    def loss(self, rows: Rows, packing: bool) -> Tensor:
        """The mean over the label tokens."""
        raise NotImplementedError

    def load(self, folder: str, dtype: str) -> dict[str, float]:
        started = time.perf_counter()
        self.model = self.load_model(folder, getattr(torch, dtype))
        seconds = time.perf_counter() - started
        tensors = self.model.state_dict().values()
        held = {t.data_ptr(): t.nbytes for t in tensors}  # a tied one is there twice
        return {"seconds": seconds, "model_mb": sum(held.values()) / 1e6}

    def prepare(self, rank: int, checkpointing: bool) -> dict[str, float]:
        started = time.perf_counter()
        torch.manual_seed(0)
        self.model = self.adapted(rank, checkpointing)
        seconds = time.perf_counter() - started
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.make_optimizer(lr=LEARNING_RATE, weight_decay=0.0)
        trained = sum(p.numel() for p in self.params)
        return {"seconds": seconds, "trained": trained}

    def step(self, rows: Rows, packing: bool) -> dict[str, float]:
        started = time.perf_counter()
        loss = self.loss(rows, packing)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "seconds": time.perf_counter() - started}


class Lorakit(Side):
    def __init__(self) -> None:
        import lorakit as lk

        self.lk = lk
        # imported on first use
        self.used = lk.load_model, lk.attach, lk.LoraConfig, lk.optim, lk.own_threads

    def load_model(self, folder: str, dtype: torch.dtype) -> nn.Module:
        return self.lk.load_model(folder, dtype=dtype, quantize="nf4", device="cpu")

    def adapted(self, rank: int, checkpointing: bool) -> nn.Module:
        self.model.gradient_checkpointing = checkpointing
        config = self.lk.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        return self.lk.attach(self.model, config).train()

    def make_optimizer(self, **options: float) -> torch.optim.Optimizer:
        return self.lk.optim.AdamW(self.params, **options)

    def step(self, rows: Rows, packing: bool) -> dict[str, float]:
        with self.lk.own_threads(self.model):  # as `lorakit.train` has them
            return super().step(rows, packing)

    def loss(self, rows: Rows, packing: bool) -> Tensor:
        if packing:
            ids, labels = joined(rows)
            bounds = torch.tensor([0, *accumulate(len(ids) for ids, _ in rows)])
            total, count = self.model.loss(ids, labels, cu_seqlens=bounds)
        else:
            ids, labels, _ = padded(rows)  # no real token sees the padding after it
            total, count = self.model.loss(ids, labels)
        return total / count


class Emulated(Lorakit):
    """lorakit in plain torch, in which products round where those of a GPU would."""

    def adapted(self, rank: int, checkpointing: bool) -> nn.Module:
        self.backend = self.lk.kernels.use_backend("reference")
        self.backend.__enter__()  # until the process ends
        return super().adapted(rank, checkpointing)


class Float8(Emulated):
    """Lorakit's side with frozen products in float8."""

    def adapted(self, rank: int, checkpointing: bool) -> nn.Module:
        import lorakit.training.float8

        model = super().adapted(rank, checkpointing)
        lorakit.training.float8.start_float8(model)
        return model


class Peft(Side):
    def __init__(self) -> None:
        import bitsandbytes  # noqa: F401, which transformers imports with the first model
        import peft
        import transformers

        self.peft, self.transformers = peft, transformers
        self.used = transformers.AutoModelForCausalLM  # imported on first use

    def load_model(self, folder: str, dtype: torch.dtype) -> nn.Module:
        self.dtype = dtype
        config = self.transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        return self.transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=dtype, device_map="cpu"
        )

    def adapted(self, rank: int, checkpointing: bool) -> nn.Module:
        if checkpointing:
            options = {"use_reentrant": False}
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        # lorakit's "all-linear" leaves these small ones of linear attention out
        small = (".in_proj_a", ".in_proj_b", ".in_proj_ba")
        config = self.peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear",
            exclude_modules=[n for n, _ in self.model.named_modules() if n.endswith(small)] or None,
            task_type="CAUSAL_LM",
        )
        return self.peft.get_peft_model(self.model, config).train()

    def make_optimizer(self, **options: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.params, fused=True, **options)

    def loss(self, rows: Rows, packing: bool) -> Tensor:
        if packing:  # transformers tells the rows by their positions, where there is no cache
            ids, labels = joined(rows)
            places = torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None]
            inputs = {"input_ids": ids, "labels": labels, "position_ids": places}
        else:
            ids, labels, real = padded(rows)
            inputs = {"input_ids": ids, "labels": labels, "attention_mask": real}
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.model(**inputs, use_cache=False).loss


class Full(Lorakit):
    """Lorakit's training of the model itself; its state of AdamW has `bits` bits."""

    bits = 32

    def load_model(self, folder: str, dtype: torch.dtype) -> nn.Module:
        return self.lk.load_model(folder, dtype=dtype, device="cpu")

    def adapted(self, rank: int, checkpointing: bool) -> nn.Module:
        self.model.gradient_checkpointing = checkpointing
        return self.model.train()

    def make_optimizer(self, **options: float) -> torch.optim.Optimizer:
        return self.lk.optim.AdamW(self.params, state_bits=self.bits, **options)


class Full8bit(Full):
    bits = 8


class Transformers(Peft):
    """Transformers' training of the model itself, as its Trainer does it with bf16=True.

    The weights are fp32, and products under autocast take them in bfloat16.
    """

    def __init__(self) -> None:
        import transformers

        self.transformers = transformers
        self.used = transformers.AutoModelForCausalLM  # imported on first use

    def load_model(self, folder: str, dtype: torch.dtype) -> nn.Module:
        self.dtype = dtype
        return self.transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def adapted(self, rank: int, checkpointing: bool) -> nn.Module:
        if checkpointing:
            options = {"use_reentrant": False}
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        return self.model.train()


# ---- what both sides read -----------------------------------------------------------------------


class Writer:
    """Writes models and rows for the sides, and says on what they will run."""

    def __init__(self) -> None:
        import lorakit as lk
        import lorakit.models.decoder  # the decoder itself: load_model would want a file
        import lorakit.models.per_layer

        self.lk, self.decoder = lk, lorakit.models.decoder.Decoder
        self.host_tables = lorakit.models.per_layer.host_tables

    def machine(self) -> dict[str, Any]:
        isa = torch.backends.cpu.get_cpu_capability()
        return {"threads": torch.get_num_threads(), "isa": isa}

    def rate(self, dtype: str) -> dict[str, Any]:
        """The rate of one large product, TFLOP/s: the best of nine, in `dtype` and in fp32."""
        found = []
        for kind in {getattr(torch, dtype), torch.float32}:
            a, b = torch.randn(2, 2048, 2048).to(kind)
            for _ in range(9):
                start = time.perf_counter()
                a @ b.t()
                found.append(time.perf_counter() - start)
        return {"rate": 2 * 2048**3 / min(found) / 1e12}

    def model(self, source: str, folder: str, dtype: str) -> dict[str, Any]:
        """A Hugging Face directory of a .gguf file."""
        self.lk.save_model(self.lk.load_model(source, dtype=dtype, device="cpu"), folder)
        return {}

    def first_layers(self, source: str, folder: str, count: int | None) -> dict[str, Any]:
        """A directory of a model's first layers, or of all of them, in fp32."""
        model = self.lk.load_model(source, dtype="float32", device="cpu")
        if count is not None:
            config = model.config.to_hf() | {"num_hidden_layers": count}
            smaller = self.decoder(self.lk.ModelConfig.from_hf(config, "the model"))
            names = {name for name, _ in smaller.named_parameters()}
            state = {n: t for n, t in model.state_dict().items() if n in names}
            smaller.load_state_dict(state)
            smaller.source, model = model.source, smaller
        self.lk.save_model(model, folder)
        return {}

    def tokenizer(self, source: str, folder: str) -> dict[str, Any]:
        """The tokenizer of a model, beside another one's weights."""
        self.lk.load_tokenizer(source).save(folder)
        return {}

    def rows(self, folder: str, kind: str, length: int, batch: int, count: int) -> dict[str, Any]:
        """`count` batches of Python's own standard library, in the tokens of `folder`'s model.

        kind: "dense", rows of `length` tokens with labels on all; "ragged", rows of 30 to 150
        tokens, of which the first quarter to three quarters are a prompt, without labels. The first
        token of a row has none in either: nothing predicts it.
        """
        tokens = library_tokens(self.lk.load_tokenizer(folder))
        rng = random.Random(0)

        def row() -> tuple[list[int], list[int]]:
            size, prompt = length, 1
            if kind == "ragged":
                size = rng.randint(SHORTEST, LONGEST)
                prompt = int(size * rng.uniform(0.25, 0.75))
            ids = list(islice(tokens, size))
            if len(ids) < size:
                raise ValueError("the standard library holds too little text for all the rows")
            return ids, [IGNORE] * prompt + ids[prompt:]

        return {"batches": [[row() for _ in range(batch)] for _ in range(count)]}

    def random_model(self, folder: str, config: dict[str, Any]) -> dict[str, Any]:
        """A bf16 checkpoint of the shapes of `config`, a config.json, which is written last.

        One tensor at a time is in memory; matrices are N(0, 0.02), norms are 1.
        """
        with torch.device("meta"):
            model = self.decoder(self.lk.ModelConfig.from_hf(config, "the shape"))
        # the format: the header's length in 8 bytes, the header in JSON, all tensors' bytes
        header, end = {"__metadata__": {"format": "pt"}}, 0
        tensors = dict(model.named_parameters())
        tensors |= {name: table.weight for name, table in self.host_tables(model).items()}
        for name, p in tensors.items():
            span = [end, end + 2 * p.numel()]
            header[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": span}
            end = span[1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        torch.manual_seed(0)
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(Path(folder, "model.safetensors"), "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for p in tensors.values():
                values = torch.ones(p.shape, dtype=torch.bfloat16)
                if p.dim() > 1:
                    values.normal_(std=0.02)
                values.view(torch.uint8).numpy().tofile(file)
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return {}


def library_tokens(tok: Any) -> Iterator[int]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield from tok.encode(path.read_text(encoding="utf-8"), add_special_tokens=False)


SIDES = {
    "lorakit": Lorakit, "emulated": Emulated, "float8": Float8, "peft": Peft, "writer": Writer,
    "full": Full, "full8bit": Full8bit, "transformers": Transformers,
}  # fmt: skip
