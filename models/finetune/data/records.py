"""What one training example is: a conversation of turns, each of parts of text and images.

The canonical record::

    {"conversation": [{"role": "system" | "user" | "assistant" | "tool", "content": str | [part, ...]}, ...],
     "tools": [...]}                                                              # tools: optional, JSON schemas
    part: {"type": "text", "text": str} | {"type": "image", "image": Image | {"bytes", "path"} | path or http(s) URL}

An assistant turn may have ``tool_calls`` as OpenAI writes them, a tool turn ``tool_call_id`` and ``name``.
"""

from m3kernels.models.finetune.config import FinetuneError


class BadRecord(FinetuneError):
    """A record that cannot be trained on.

    Attributes:
        where: file and line, or set and index, such as ``train.jsonl:12``.
        reason: what is wrong with it.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}" if where else reason)
        self.where, self.reason = where, reason

    def __reduce__(self):
        return type(self), (self.where, self.reason)

    def at(self, where: str) -> "BadRecord":
        """The same, at a place that only the caller knows; one that is known stays."""
        return BadRecord(self.where or where, self.reason)


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def image_part(image) -> dict:
    return {"type": "image", "image": image}


def question(images, prompt: str, answer: str) -> dict:
    """The record of one answer to images, then a prompt."""
    return {
        "conversation": [
            {"role": "user", "content": [*(image_part(i) for i in images), text_part(prompt)]},
            {"role": "assistant", "content": [text_part(answer)]},
        ]
    }
