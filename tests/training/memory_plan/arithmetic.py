"""A forecast by arithmetic, so that the searches over forecasts can be held to a truth."""

import dataclasses

import lorakit as lk
from lorakit.models.config import ModelConfig
from lorakit.training.memory_plan import planned

LAYERS, HIDDEN, VOCABULARY = 4, 64, 1000
CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
)


def arithmetic(model, *, quantize, lora, train, tokens, documents, shard, offload_weights, **_):
    """A plan whose bytes follow from the settings by plain products, as in PLAN of the tests."""
    weights = 1_000_000 if quantize is None else 250_000
    ends = 400_000 if quantize is None or quantize.embed_tokens is None else 100_000
    host = weights if offload_weights else 0
    weights = 0 if offload_weights else weights // (2 if shard == "full" else 1)
    count = sum(documents) if documents else tokens * train.rows_at_a_time
    kept = {True: 20, False: 100}[train.gradient_checkpointing]
    if train.activation_offloading:
        kept = 10
    elif not train.gradient_checkpointing and train.mlp_activations == "recompute":
        kept = 70
    rank = 0 if lora is None else lora.r
    state = 0 if "paged" in train.optim else 800 if "8bit" in train.optim else 3200
    resident = {"weights": weights, "ends": ends, "adapters": 1600 * rank, "state": state * rank}
    at_peak = {**resident, "activations": kept * count, "gradients": 1600 * rank}
    peak = sum(at_peak.values())
    phases = {"loading": weights + ends, "forward": peak - 10, "backward": peak}
    return lk.MemoryPlan(
        peak=peak,
        reserved=peak + 1000,
        host=host,
        when="backward",
        resident=resident,
        at_peak=at_peak,
        phases=phases,
        activations={"mlp": kept * count},
        seconds=0.0,
    )


def counted_forecasts(monkeypatch):
    """Let every forecast be by `arithmetic`, and return the list that their arguments go into."""
    made = []

    def counted(model, **settings):
        made.append(settings)
        return arithmetic(model, **settings)

    monkeypatch.setattr(planned, "plan_memory", counted)
    return made


def run(lora=None, quantize=None, device="cuda", ranks=1, lengths=None, **train):
    """A run of the small model, packed in 4 bits unless `quantize` is "none"."""
    quant = None if quantize == "none" else quantize or lk.QuantConfig()
    return lk.PlannedRun(
        CONFIG,
        lk.TrainConfig(**{"max_seq_length": 512, **train}),
        lora or lk.LoraConfig(r=8),
        quant,
        device=device,
        ranks=ranks,
        lengths=lengths,
    )


def needs(run, **changes):
    """The bytes that a run reserves with changes."""
    return dataclasses.replace(run, **changes).forecast().reserved
