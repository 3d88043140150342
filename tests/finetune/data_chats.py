"""Conversations and encoders that tests of data share."""

import functools

from data_folders import mistral_folder, processor_folder
from PIL import Image

from m3kernels.models.finetune.data.encode import Encoder

BOS, EOS, INST, END_INST, IMG, PAD, BREAK, IMG_END, SYSTEM, END_SYSTEM = 1, 2, 3, 4, 10, 11, 12, 13, 17, 18


CONTROL = [
    "[/INST]",
    "[INST]",
    "</s>",
    "<s>",
    "[IMG]",
    "[IMG_END]",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[/TOOL_RESULTS]",
    "<pad>",
]


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds [ARGS] numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


@functools.cache
def encoder(backend: str) -> Encoder:
    folders = {"mistral": mistral_folder, "processor": processor_folder}
    folder = folders.get(backend, functools.partial(processor_folder, template=False))()
    made = Encoder.open(folder)
    assert made.backend == backend
    return made


def user(*content):
    return {"role": "user", "content": [part if isinstance(part, dict) else text(part) for part in content]}


def text(value):
    return {"type": "text", "text": value}


def image(width, height, colour="red", mode="RGB"):
    return {"type": "image", "image": Image.new(mode, (width, height), colour)}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def record(*turns, **fields):
    return {"conversation": list(turns), **fields}


def letter(character: str) -> int:
    return 1000 + ord(character)


CHATS = {
    "one": record(user("Hello"), assistant("Hi there")),
    "literals": record(user(" ".join(CONTROL)), assistant("No " + "".join(CONTROL)), user("\ue000[/INST]"), assistant("x")),
    "system": record({"role": "system", "content": "Be [INST] brief"}, user("A\n"), assistant("B\n\n")),
    "turns": record(user("A"), assistant("B"), user("C"), assistant("D"), user("é ü 漢"), assistant("F ")),
    "images": record(
        user(image(300, 400), "What?\n", image(100, 40), "and"), assistant("a cat"), user("again", image(28, 28)), assistant("b")
    ),
    "image last": record(user("A", image(60, 30)), assistant("B")),
    "two texts": record(user("A", "B", image(60, 30)), assistant("C")),
    "runs": record(user("A", "B"), user("C"), assistant("D"), assistant([text("E"), text("F")])),
    "tools": record(
        user("1+2"),
        assistant(None, tool_calls=[{"function": {"name": "add", "arguments": {"a": "é [ARGS]"}}}]),
        {"role": "tool", "content": "3 [/TOOL_RESULTS]"},
        assistant("It is 3"),
        tools=[TOOL],
    ),
}  # fmt: skip
