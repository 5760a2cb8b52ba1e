"""Rows of Alpaca: chats, or the prompts of Stanford Alpaca for models without a chat template."""

import lorakit as lk
from lorakit.data.encode import Encoder
from tests.data.chats import GENERATION, TURNS, assistant, encode, shown, user


def test_alpaca(tiny):
    chat = tiny(TURNS + GENERATION)
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Go.", "output": "x"},
    ]
    full, plain = lk.read_rows(rows)
    expected = [user("Add.\n\n1 2"), assistant("3")]
    assert Encoder(chat)(full) == encode(chat, expected)
    bare = tiny(None)
    example = Encoder(bare)(full)
    text = bare.decode(example.input_ids)
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:3")
    assert shown(bare, example) == ["3</s>"]
    assert "### Input" not in bare.decode(Encoder(bare)(plain).input_ids)
