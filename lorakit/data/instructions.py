"""What an instruction becomes: a chat, or a prompt if the tokenizer has no chat template."""

from lorakit.data.schemas import Chat, Instruction, Pair

# The prompts of Stanford Alpaca (tatsu-lab/stanford_alpaca, train.py).
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def as_chat_or_pair(row: Instruction, chat: bool) -> Chat | Pair:
    """Return an instruction as a chat of two messages, or as Alpaca's prompt and its completion."""
    if chat:
        messages = [
            {"role": "user", "content": request(row.instruction, row.input)},
            {"role": "assistant", "content": row.output},
        ]
        return Chat(messages, None, 0, row.place)
    prompt = _ALPACA_WITH_INPUT if row.input else _ALPACA
    prompt = prompt.format(instruction=row.instruction, input=row.input)
    return Pair(prompt, row.output, row.place)


def request(instruction: str, input: str) -> str:
    """Return what a user says who gives an instruction, and something to carry it out on."""
    return f"{instruction}\n\n{input}" if input else instruction
