"""Token ids and answer spans by mistral-common, the reference for Ministral's chat format."""

from pathlib import Path

import numpy as np

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.pixels import MistralImages, check_grid, image_tokens, limited
from m3kernels.models.finetune.data.records import BadRecord, Turn

try:
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct import messages as chat
    from mistral_common.protocol.instruct.chunk import ImageURLChunk, TextChunk, ThinkChunk
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import Tool, ToolCall
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.image import ImageEncoding
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
except ImportError as error:
    raise FinetuneError(
        f"tekken.json needs mistral-common ({error}); pip install 'm3kernels[train]', or use backend='processor'"
    ) from error

_MESSAGES = ("encode_system_message", "encode_user_message", "encode_assistant_message", "encode_tool_message")


class MistralChat:
    """mistral-common's tokenizer, told the sizes of images instead of their pixels.

    The tokens are those of ``encode_chat_completion`` itself. While it runs, the length of each message is noted, so
    that answers are known by construction, whatever their text or the tokenizer's version.
    """

    def __init__(self, file: Path, *, max_image_size: int | None) -> None:
        try:
            self.tokenizer = MistralTokenizer.from_file(str(file), mode=ValidationMode.finetuning)
        # a damaged file, or a Git LFS pointer: whatever its reader stumbles over
        except Exception as error:
            raise FinetuneError(f"{file} is no tekken.json ({type(error).__name__}: {error}); get it again") from error
        self.instruct = self.tokenizer.instruct_tokenizer
        self.tekken = self.instruct.tokenizer
        self.bos, self.eos, self.pad = self.tekken.bos_id, self.tekken.eos_id, self.tekken.pad_id
        own = self.instruct.image_encoder
        self.images, self.image, self.layout = None, None, None
        if own is not None:
            config = own.image_config
            check_grid(config.image_patch_size, config.spatial_merge_size, str(file))
            self.images = MistralImages(limited(config.max_image_size, max_image_size))
            self.image = own.special_ids.img
            self.layout = {"image": self.image, "row_end": own.special_ids.img_break, "end": own.special_ids.img_end}
            self.instruct.image_encoder = self._image
        self._sizes, self._lengths = (), []
        for name in _MESSAGES:
            setattr(self.instruct, name, self._noting(getattr(self.instruct, name), "assistant" in name))

    def encode(
        self, turns: tuple[Turn, ...], tools: tuple[dict, ...], sizes: tuple[tuple[int, int], ...]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and from where to where each answer with its end goes."""
        self._sizes, self._lengths = sizes, []
        try:
            request = ChatCompletionRequest(
                messages=_messages(turns), tools=[Tool.model_validate(tool) for tool in tools] or None
            )
            tokens = self.tokenizer.encode_chat_completion(request).tokens
        # pydantic's errors are ValueErrors; upstream checks some structure by assert
        except (MistralCommonException, ValueError, AssertionError, NotImplementedError) as error:
            raise BadRecord("", f"mistral-common refuses the conversation: {' '.join(str(error).split())}") from error
        at = len(tokens) - sum(length for length, _ in self._lengths)
        if tokens[:at] != self.instruct.start():
            raise FinetuneError(
                "mistral-common's tokens are not those of its messages one after the other; install a tested version "
                "(1.9 to 1.13)"
            )
        spans = []
        for length, is_answer in self._lengths:
            if is_answer:
                spans.append((at, at + length))
            at += length
        return tokens, spans

    def text(self, text: str) -> list[int]:
        """The ids of plain text: nothing in it is a control token."""
        return self.tekken.encode(text, bos=False, eos=False)

    def decode(self, tokens: list[int]) -> str:
        return self.tekken.decode(tokens)

    def control(self, token: int) -> str | None:
        return self.tekken.id_to_piece(token) if token < self.tekken.num_special_tokens else None

    def has_control(self, name: str) -> bool:
        return any(self.control(token) == name for token in range(self.tekken.num_special_tokens))

    def _noting(self, encode_message, is_answer: bool):
        def encode(*args, **kwargs):
            made = encode_message(*args, **kwargs)
            self._lengths.append((len(made if is_answer else made[0]), is_answer))
            return made

        return encode

    def _image(self, chunk: ImageURLChunk) -> ImageEncoding:
        tokens = image_tokens(self._sizes[int(chunk.get_url())], **self.layout)
        return ImageEncoding(tokens=tokens, image=np.empty((0,), dtype=np.float32))


def _messages(turns: tuple[Turn, ...]) -> list:
    messages, image = [], 0
    for turn in turns:
        chunks = []
        for part in turn.parts:
            if part["type"] == "text":
                chunks.append(TextChunk(text=part["text"]))
            elif part["type"] == "thinking":
                chunks.append(ThinkChunk(thinking=part["thinking"]))
            else:
                chunks.append(ImageURLChunk(image_url=str(image)))
                image += 1
        # one text goes as a string: lists are refused by some roles of older tokenizer versions
        content = turn.text if all(part["type"] == "text" for part in turn.parts) and len(chunks) < 2 else chunks
        if turn.role == "system":
            messages.append(chat.SystemMessage(content=content))
        elif turn.role == "user":
            messages.append(chat.UserMessage(content=content))
        elif turn.role == "tool":
            messages.append(chat.ToolMessage(content=turn.text, tool_call_id=turn.tool_call_id, name=turn.name))
        else:
            calls = [ToolCall.model_validate(call) for call in turn.tool_calls] or None
            messages.append(chat.AssistantMessage(content=content or None, tool_calls=calls))
    return messages
