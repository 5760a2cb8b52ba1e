"""Chats and templates that several tests encode."""

from lorakit.data.encode import IGNORE, Encoder
from lorakit.data.schemas import Chat

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Sums <two> numbers & é",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


SYSTEM = {"role": "system", "content": "Be brief."}


def encode(tok, messages, tools=None, train_on="completion", first=0, **options):
    return Encoder(tok, train_on=train_on, **options)(Chat(messages, tools, first, "row 0"))


def shown(tok, example):
    """The runs of labels, as text."""
    runs, last = [], None
    for i, label in enumerate(example.labels):
        if label != IGNORE:
            assert label == example.input_ids[i]
            if last != i - 1:
                runs.append([])
            runs[-1].append(label)
            last = i
    return [tok.decode(run, skip_special_tokens=False) for run in runs]


CHAT = [SYSTEM, user("ab"), assistant("cd")]
TURNS = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<s>assistant: {% endif %}"
