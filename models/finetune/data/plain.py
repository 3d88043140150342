"""Prompt and completion for base checkpoints, which have no chat format."""

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.pixels import image_tokens
from m3kernels.models.finetune.data.records import BadRecord, Turn


class PlainText:
    """The begin token, then for each exchange its images and text, a line break, the answer and the end token.

    Args:
        vocabulary: has ``text``, ``decode`` and the control tokens' ids, as MistralChat and FastTokenizer have.
        images: as in :mod:`m3kernels.models.finetune.data.pixels`.
    """

    def __init__(self, vocabulary, images) -> None:
        self.vocabulary, self.images = vocabulary, images
        self.bos, self.eos, self.pad = vocabulary.bos, vocabulary.eos, vocabulary.pad
        self.image = vocabulary.image

    def encode(
        self, turns: tuple[Turn, ...], tools: tuple[dict, ...], sizes: tuple[tuple[int, int], ...]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and from where to where each answer with its end goes."""
        if tools or any(turn.role == "tool" or turn.tool_calls for turn in turns):
            raise BadRecord("", "tools need a chat format, and the plain format of base checkpoints has none")
        tokens, spans, remaining = [self.bos], [], iter(sizes)
        for turn in turns:
            if turn.role == "assistant":
                answer = [*self.vocabulary.text(turn.text), self.eos]
                spans.append((len(tokens), len(tokens) + len(answer)))
                tokens += answer
                continue
            text = ""
            for part in turn.parts:
                if part["type"] == "text":
                    text += part["text"]
                    continue
                if self.vocabulary.layout is None:
                    raise FinetuneError("the tokenizer has no [IMG], [IMG_BREAK] and [IMG_END] for the record's image")
                tokens += self.vocabulary.text(text) if text else []
                text = ""
                tokens += image_tokens(next(remaining), **self.vocabulary.layout)
            tokens += self.vocabulary.text(text + "\n")
        return tokens, spans

    def decode(self, tokens: list[int]) -> str:
        return self.vocabulary.decode(tokens)

    def control(self, token: int) -> str | None:
        return self.vocabulary.control(token)

    def has_control(self, name: str) -> bool:
        return self.vocabulary.has_control(name)
