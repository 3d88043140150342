"""Token ids and answer spans by a Hugging Face chat template and fast tokenizer."""

import json
import re
from itertools import groupby
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.pixels import (
    NoImages,
    ProcessorImages,
    check_grid,
    image_tokens,
    limited,
)
from m3kernels.models.finetune.data.records import BadRecord, Turn

# private-use characters; one that no text of a record holds breaks up what looks like a control token in its texts
_BREAKERS = "\ue000\uf8ff\U000f0000\U0010fffd"
# the split of GPT-4's tokenizer, which early conversions of Mistral's gave tokenizer.json by mistake
_WRONG_SPLIT = "(?i:'s|'t|'re|"


class FastTokenizer:
    """A folder's tokenizer.json: plain text, and Ministral's control tokens by name."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "tokenizer.json").is_file():
            raise FinetuneError(
                f"{folder} has neither tekken.json nor tokenizer.json; copy the tokenizer's files of the checkpoint there"
            )
        try:
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        # a damaged file, or a Git LFS pointer: whatever its reader stumbles over; tokenizers raises bare Exceptions
        except Exception as error:
            raise FinetuneError(
                f"the tokenizer's files of {folder} cannot be read ({type(error).__name__}: {error}); get tokenizer.json "
                "and tokenizer_config.json again"
            ) from error
        self.bos, self.eos, self.pad = (self._id(name) for name in ("bos", "eos", "pad"))
        self.specials = {str(token): n for n, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._names = {n: name for name, n in self.specials.items()}
        state = self.tokenizer.backend_tokenizer.pre_tokenizer
        split = "" if state is None else json.dumps(json.loads(state.__getstate__()), ensure_ascii=False)
        if "[INST]" in self.specials and _WRONG_SPLIT in split:
            raise FinetuneError(
                f"{folder}/tokenizer.json splits text by another pattern than Mistral's; put the checkpoint's tekken.json "
                "beside it, or save the tokenizer once more after loading it with fix_mistral_regex=True"
            )
        self.image = self.specials.get("[IMG]")
        self.layout = None
        if all(name in self.specials for name in ("[IMG]", "[IMG_BREAK]", "[IMG_END]")):
            row_end, end = self.specials["[IMG_BREAK]"], self.specials["[IMG_END]"]
            self.layout = {"image": self.image, "row_end": row_end, "end": end}

    def text(self, text: str) -> list[int]:
        """The ids of plain text: nothing in it is a control token."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def control(self, token: int) -> str | None:
        return self._names.get(token)

    def has_control(self, name: str) -> bool:
        return name in self.specials

    def _id(self, kind: str) -> int:
        # a pad token is never trained on nor attended to: the end serves where there is none
        found = getattr(self.tokenizer, f"{kind}_token_id")
        found = self.tokenizer.eos_token_id if found is None and kind == "pad" else found
        if found is None:
            raise FinetuneError(f"the tokenizer has no {kind}_token; name it in tokenizer_config.json")
        return found


def folder_images(folder: Path, *, max_image_size: int | None):
    """The image processor of a folder, or :class:`NoImages`.

    Raises:
        FinetuneError: patches or merging other than Ministral 3's.
    """
    files = [folder / name for name in ("processor_config.json", "preprocessor_config.json")]
    configs = [json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {} for file in files]
    nested = configs[0].get("image_processor") or configs[1]
    if not nested:
        return NoImages()
    patch = configs[0].get("patch_size", nested.get("patch_size"))
    patch = patch.get("height") if isinstance(patch, dict) else patch
    check_grid(patch, configs[0].get("spatial_merge_size", 1), str(files[0]))
    # not AutoImageProcessor: with torchvision it takes a class of other pixels, without it some releases fail
    processor = PixtralImageProcessorPil.from_pretrained(folder)
    return ProcessorImages(processor, limited(dict(processor.size)["longest_edge"], max_image_size))


class ProcessorChat(FastTokenizer):
    """A chat template's text, cut at its control tokens, and each piece of plain text by the fast tokenizer.

    Answers are found by rendering the conversation up to each: every rendering must begin the next. A system prompt that
    the template itself puts before conversations without one stays, as it does in generation.
    """

    def __init__(self, folder: Path, *, max_image_size: int | None) -> None:
        super().__init__(folder)
        self.template = chat_template(folder, self.tokenizer)
        self.images = folder_images(folder, max_image_size=max_image_size)
        self._controls = re.compile("(" + "|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))) + ")")

    def encode(
        self, turns: tuple[Turn, ...], tools: tuple[dict, ...], sizes: tuple[tuple[int, int], ...]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and from where to where each answer with its end goes."""
        breaker = _breaker(turns, tools)
        messages = [self._message(turn, breaker) for turn in turns]
        tools = self._broken(list(tools), breaker) or None
        tokens, spans, rendered, images = [], [], "", iter(sizes)
        for stop, answer in _cuts(turns):
            text = self._render(messages[:stop], tools, prompt=not answer)
            if not text.startswith(rendered):
                raise FinetuneError(
                    f"the chat template writes the first turns otherwise once turn {stop - 1} follows, so that answers "
                    "cannot be told apart; use a checkpoint with tekken.json"
                )
            added = self._ids(text[len(rendered) :], breaker, images)
            if answer:
                ends = [n for n, token in enumerate(added) if token == self.eos]
                if not ends:
                    raise FinetuneError("the chat template does not end answers with the tokenizer's eos_token")
                spans.append((len(tokens), len(tokens) + ends[-1] + 1))
            tokens += added
            rendered = text
        if next(images, None) is not None:
            raise FinetuneError("the chat template leaves images out; use a checkpoint with tekken.json")
        if tokens.count(self.bos) > 1 or tokens[0] != self.bos:
            raise FinetuneError(
                f"the chat template gives {tokens.count(self.bos)} begin tokens; there must be one, first"
            )
        return tokens, spans

    def _render(self, messages: list[dict], tools: list | None, *, prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt, chat_template=self.template
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BadRecord("", f"the chat template refuses the conversation: {error}") from error

    def _ids(self, text: str, breaker: str, images) -> list[int]:
        ids = []
        for piece in self._controls.split(text):
            if piece == "[IMG]" and self.layout:
                size = next(images, None)
                if size is None:
                    raise FinetuneError("the chat template places more images than there are")
                ids += image_tokens(size, **self.layout)
            elif piece in self.specials:
                ids.append(self.specials[piece])
            else:
                ids += self.text(piece.replace(breaker, ""))
        return ids

    def _message(self, turn: Turn, breaker: str) -> dict:
        content = [{"type": "image"} if part["type"] == "image" else part for part in turn.parts]
        content = content if any(part["type"] != "text" for part in turn.parts) else turn.text
        message = {"role": turn.role, "content": content}
        if turn.tool_calls:
            message["tool_calls"] = list(turn.tool_calls)
        if turn.tool_call_id:
            message |= {"tool_call_id": turn.tool_call_id} | ({"name": turn.name} if turn.name else {})
        return {"role": turn.role} | self._broken({k: v for k, v in message.items() if k != "role"}, breaker)

    def _broken(self, value, breaker: str):
        """The same with every control string of its texts broken up."""
        if isinstance(value, str):
            return self._controls.sub(lambda found: found[0][0] + breaker + found[0][1:], value)
        if isinstance(value, dict):
            return {self._broken(key, breaker): self._broken(item, breaker) for key, item in value.items()}
        return [self._broken(item, breaker) for item in value] if isinstance(value, (list, tuple)) else value


def chat_template(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The template of a folder: the tokenizer's, or that of older processors."""
    older = folder / "chat_template.json"
    if tokenizer.chat_template is None and older.is_file():
        return json.loads(older.read_text(encoding="utf-8"))["chat_template"]
    return tokenizer.chat_template


def has_chat_template(folder: Path) -> bool:
    """Whether a folder's files name a chat template, without loading its tokenizer."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))


def _cuts(turns: tuple[Turn, ...]) -> list[tuple[int, bool]]:
    """Where to stop rendering, before and after each run of answers: (number of turns, whether an answer ends there)."""
    cuts, at = [], 0
    for answer, run in groupby(turns, key=lambda turn: turn.role == "assistant"):
        at += len(list(run))
        cuts.append((at, answer))
    return cuts


def _breaker(turns: tuple[Turn, ...], tools: tuple[dict, ...]) -> str:
    texts = repr([(turn.parts and turn.text, turn.tool_calls) for turn in turns]) + repr(tools)
    for breaker in _BREAKERS:
        if breaker not in texts and repr(breaker)[1:-1] not in texts:
            return breaker
    raise BadRecord(
        "", "the text holds all private-use characters that are needed to keep it apart from control tokens"
    )
