"""What rows say, as text: all of it, the answer, or what was asked."""

import hashlib
from typing import Any

from lorakit.config.labels import name_of
from lorakit.data.instructions import user
from lorakit.data.schemas import Chat, Choice, Instruction, Judged, Labelled, Prompt, Row, Text


def texts_of(row: Row) -> list[str]:
    """Return every text of a row, tools and variables as Python prints them."""
    if isinstance(row, Choice):
        return texts_of(row.chosen) + texts_of(row.rejected)
    if isinstance(row, Judged):
        return [*texts_of(row.answer), str(row.desirable)]
    if isinstance(row, Labelled):
        return [*texts_of(row.text), name_of(row.label)]
    if isinstance(row, Prompt):
        return [*texts_of(as_chat(row)), str(row.columns)]
    if not isinstance(row, Chat):
        return list(row[:-1])
    texts = [str(row.tools), str(row.variables)]
    for message in row.messages:
        others = {name: value for name, value in message.items() if name != "content"}
        texts += [message.get("content") or "", str(others)]
    return texts


def spoken_texts(row: Row) -> list[str]:
    """Return the texts that somebody wrote for this row: no system prompt, tools or variables.

    A chat has the contents of its messages. Of two answers both are there, the prompt once.
    """
    if isinstance(row, Choice):
        rejected = row.rejected
        if isinstance(rejected, Chat):
            rejected = rejected._replace(messages=rejected.messages[rejected.first :])
            return spoken_texts(row.chosen) + spoken_texts(rejected)
        return [*spoken_texts(row.chosen), rejected.completion]
    if isinstance(row, Judged):
        return spoken_texts(row.answer)
    if isinstance(row, Labelled):
        return spoken_texts(row.text)
    if isinstance(row, Prompt):
        row = as_chat(row)
    if not isinstance(row, Chat):
        return list(row[:-1])
    return [content_of_message(m) for m in row.messages if m["role"] not in ("system", "developer")]


def as_chat(row: Prompt) -> Chat:
    """Return a prompt as a chat that nobody has answered; text is what a user says."""
    messages = [user(row.prompt)] if isinstance(row.prompt, str) else row.prompt
    return Chat(messages, row.tools, len(messages), row.place, row.variables)


def content_of_message(message: dict[str, Any]) -> str:
    """Return the text of a message, "" if it has none."""
    return message.get("content") or ""


def answer_of(row: Row) -> str:
    """Return the answer of a row without white space around it: of two the better one.

    A prompt alone has none, nor has a text with a class, which is "".
    """
    if isinstance(row, Choice):
        return answer_of(row.chosen)
    if isinstance(row, Judged):
        return answer_of(row.answer)
    if isinstance(row, Prompt | Labelled):
        return ""
    if isinstance(row, Chat):
        return content_of_message(row.messages[-1]).strip()
    if isinstance(row, Text):
        return row.text.strip()
    return (row.output if isinstance(row, Instruction) else row.completion).strip()


def question_of(row: Row) -> str:
    """Return what the answer of a row answers: the prompt, or the message before the answer.

    Text has none, nor has a chat of one message: then it is "".
    """
    if isinstance(row, Choice):
        return question_of(row.chosen)
    if isinstance(row, Judged):
        return question_of(row.answer)
    if isinstance(row, Labelled):
        return ""
    if isinstance(row, Prompt):
        return content_of_message(as_chat(row).messages[-1])
    if isinstance(row, Chat):
        return content_of_message(row.messages[-2]) if len(row.messages) > 1 else ""
    if isinstance(row, Instruction):
        return f"{row.instruction}\n{row.input}" if row.input else row.instruction
    return "" if isinstance(row, Text) else row.prompt


def asked_of(row: Row) -> list[str]:
    """Return all texts before the answer of a row but the system's; text has none."""
    if isinstance(row, Choice):
        return asked_of(row.chosen)
    if isinstance(row, Judged):
        return asked_of(row.answer)
    if isinstance(row, Prompt | Labelled):
        return spoken_texts(row)
    if not isinstance(row, Chat):
        return [question_of(row)] if question_of(row) else []
    return spoken_texts(row._replace(messages=row.messages[:-1]))


def class_of(row: Row) -> str:
    """Return the class of a row: its answer, or whether that is a good one where a row says it."""
    if isinstance(row, Labelled):
        return name_of(row.label)
    return str(row.desirable).lower() if isinstance(row, Judged) else answer_of(row)


def words_digest(*texts: str) -> bytes:
    """Return 16 bytes that depend on the words of texts, and not on the white space between."""
    words = "\0".join(" ".join(text.split()) for text in texts)
    return hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest()
