"""What objective grpo adds to a forecast: the pages of its sampler, and steps on completions.

The pages are taken once and stay. Sampling is told at its end, where it takes most: the completions
that the sampler continues at a time are all at their last token. So is learning: every completion
is as long as it may be, after the longest prompt.
"""

from collections.abc import Sequence

import torch

from lorakit import kernels
from lorakit.config.training import TrainConfig
from lorakit.data.encode import AnyExample, count_labels
from lorakit.evaluation.share import Share
from lorakit.inference.decode import Decoding, decoding_of
from lorakit.inference.kv_cache import PART
from lorakit.models.decoder import Decoder
from lorakit.training.losses.batch import Batch, collated
from lorakit.training.losses.graded import GradedBatch
from lorakit.training.memory_plan.watch import Watch
from lorakit.training.mode import evaluation_mode
from lorakit.training.rollouts.sampler import slots_of
from lorakit.training.step import Prepared


def sample(model: Decoder, config: TrainConfig, longest: int, ranks: int, watch: Watch) -> Decoding:
    """Take the sampler's pages, read a prompt, and compute the last token of all completions.

    Args:
        model: The model, of tensors without memory.
        config: The settings of the run.
        longest: The tokens of the longest prompt and its completion.
        ranks: How many processes share the prompts of a step.
        watch: Is told what happens.

    Returns:
        What holds the pages.
    """
    assert config.grpo is not None
    slots, last = slots_of(config), longest - 1
    watch.begin("generate", ("keys and values", ""))
    with evaluation_mode(model):
        decoding = decoding_of(model, slots, longest)
        cache = decoding.cache
        watch.begin("generate", ("activations", "residual"))
        lines = [cache.line()]
        prompt = torch.ones(
            1, longest - config.grpo.max_completion_length, dtype=torch.int64, device=model.device
        )
        for part in prompt.split(PART, dim=1):
            decoding(lines, part)
        mine = -(-config.prompts_of_step // ranks) * config.grpo.num_generations
        for _ in range(min(slots, mine) - 1):
            lines.append(cache.line())
            cache.copy(lines[-1], lines[0])
        for line in lines:
            while line.length < last:
                n = min(PART, last - line.length)
                cache.grow(line, n)
                line.length += n
        decoding(lines, torch.ones(len(lines), 1, dtype=torch.int64, device=model.device))
        for line in lines:
            cache.release(line)
    return decoding


def graded_step(
    model: Decoder,
    taken: Sequence[Sequence[AnyExample]],
    number: int,
    config: TrainConfig,
    share: Share,
) -> Prepared:
    """Return a step that learns from completions, a batch for each list of examples."""
    batches = share.rounds([_graded(model, batch, config) for batch in taken])
    return Prepared(number, [], len(taken), batches, [], 1, 0, 0)


def _graded(model: Decoder, batch: Sequence[AnyExample], config: TrainConfig) -> Batch:
    lengths = torch.tensor([count_labels(each) for each in batch])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    sampled, advantages = torch.zeros(mask.shape), torch.zeros(len(batch))
    given = (mask, mask.clone(), advantages, sampled)
    graded = GradedBatch(*(kernels.dispatch.sent(each, model.device) for each in given))
    return collated(model, batch, config)._replace(graded=graded)
