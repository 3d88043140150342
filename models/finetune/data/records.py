"""What one training example is: a conversation of turns, each of parts of text and images.

The canonical record::

    {"conversation": [{"role": "system" | "user" | "assistant" | "tool", "content": str | [part, ...]}, ...],
     "tools": [...]}                                                              # tools: optional, JSON schemas
    part: {"type": "text", "text": str} | {"type": "image", "image": Image | {"bytes", "path"} | path or http(s) URL}

An assistant turn may have ``tool_calls`` as OpenAI writes them, a tool turn ``tool_call_id`` and ``name``.
"""

import json
from dataclasses import dataclass, replace

from m3kernels.models.finetune.config import FinetuneError

ROLES = ("system", "user", "assistant", "tool")


class BadRecord(FinetuneError):
    """A record that cannot be trained on.

    Attributes:
        where: file and line, or set and index, such as ``train.jsonl:12``; empty where only the caller knows.
        reason: what is wrong with it.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}" if where else reason)
        self.where, self.reason = where, reason

    def __reduce__(self):
        return type(self), (self.where, self.reason)

    def at(self, where: str) -> "BadRecord":
        """The same with its place, where it had none."""
        return BadRecord(self.where or where, self.reason)


def kind_of(value) -> str:
    """What JSON calls a value's kind, with its article."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {(int, float): "a number", str: "a string", (list, tuple): "a list", dict: "an object"}
    found = (name for types, name in names.items() if isinstance(value, types))
    return next(found, f"a value of type {type(value).__name__}")


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def image_part(image) -> dict:
    return {"type": "image", "image": image}


def thinking_part(text: str) -> dict:
    """What a model thinks before its answer, or how a system prompt shows it to; records have none yet."""
    return {"type": "thinking", "thinking": text}


def question(images, prompt: str, answer: str) -> dict:
    """The record of one answer to images, then a prompt."""
    return {
        "conversation": [
            {"role": "user", "content": [*(image_part(i) for i in images), text_part(prompt)]},
            {"role": "assistant", "content": [text_part(answer)]},
        ]
    }


@dataclass(frozen=True)
class Turn:
    """A checked turn: parts without gaps, each call with an id and its arguments as JSON text."""

    role: str
    parts: tuple[dict, ...]
    tool_calls: tuple[dict, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        return "\n\n".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def images(self) -> tuple:
        return tuple(part["image"] for part in self.parts if part["type"] == "image")


def read_turns(record: dict, *, system_prompt: str | None = None) -> tuple[tuple[Turn, ...], tuple[dict, ...]]:
    """The checked turns and tools of a canonical record.

    Args:
        system_prompt: put first where the conversation has none.

    Raises:
        BadRecord: no conversation, an unknown role or part, an empty answer, a last turn that is no assistant's.
    """
    conversation = record.get("conversation")
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise BadRecord("", f"conversation is {_shown(conversation)}; it must be a list of turns")
    turns = [_read_turn(message, f"turn {n}") for n, message in enumerate(conversation)]
    turns = [
        _without_end_spaces(turn) if turn.role == "assistant" and after != "assistant" else turn
        for turn, after in zip(turns, [turn.role for turn in turns[1:]] + [""])
    ]
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRecord("", "there is no assistant turn to learn from")
    if turns[-1].role != "assistant":
        raise BadRecord(
            "", f"the last turn is of role {turns[-1].role!r}; a conversation must end with the assistant's"
        )
    if system_prompt is not None and not any(turn.role == "system" for turn in turns):
        turns.insert(0, Turn("system", (text_part(system_prompt),)))
    return tuple(_with_call_ids(turns)), _read_tools(record.get("tools"))


def _read_turn(message, label: str) -> Turn:
    if not isinstance(message, dict):
        raise BadRecord("", f"{label} is {_shown(message)}; it must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise BadRecord("", f"{label} has the unknown role {_shown(role)}; allowed: {', '.join(ROLES)}")
    content = message.get("content")
    content = [] if content is None else [text_part(content)] if isinstance(content, str) else content
    if not isinstance(content, (list, tuple)):
        raise BadRecord("", f"{label}: content is {_shown(content)}; it must be text or a list of parts")
    parts = tuple(_read_part(part, label) for part in content)
    calls = tuple(_read_call(call, label) for call in _list(message.get("tool_calls"), f"{label}: tool_calls"))
    turn = Turn(role, parts, calls, *(_name(message, field, label) for field in ("tool_call_id", "name")))
    if role != "user" and turn.images:
        raise BadRecord("", f"{label} of role {role!r} has an image; only user turns can")
    if role == "assistant" and not calls and not turn.text.strip():
        raise BadRecord("", f"{label}: empty answer")
    if role != "assistant" and calls:
        raise BadRecord("", f"{label} of role {role!r} has tool_calls; only assistant turns can")
    return turn


def _without_end_spaces(turn: Turn) -> Turn:
    """mistral-common drops spaces at the end of an answer; chat templates do not, and are to give the same ids."""
    if not turn.parts or turn.parts[-1]["type"] != "text":
        return turn
    return replace(turn, parts=(*turn.parts[:-1], text_part(turn.parts[-1]["text"].rstrip(" "))))


def _read_part(part, label: str) -> dict:
    if not isinstance(part, dict):
        raise BadRecord("", f"{label}: a part is {_shown(part)}; it must be an object with a type")
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadRecord("", f"{label}: a text part's text is {_shown(part.get('text'))}")
        return text_part(part["text"])
    if kind == "image":
        if part.get("image") is None:
            raise BadRecord("", f"{label}: an image part has no image")
        return image_part(part["image"])
    raise BadRecord("", f"{label}: a part of type {_shown(kind)}; allowed: text, image")


def _read_call(call, label: str) -> dict:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord(
            "", f"{label}: a tool call is {_shown(call)}; it must have function.name and function.arguments"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise BadRecord("", f"{label}: the arguments of {function['name']} are no JSON ({error})") from error
    # one spelling: tokenizers that parse arguments and templates that copy them then give the same ids
    text = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return {
        "id": _name(call, "id", label),
        "type": "function",
        "function": {"name": function["name"], "arguments": text},
    }


def _with_call_ids(turns: list[Turn]) -> list[Turn]:
    """Calls without an id are numbered, and results without one answer the open calls in order."""
    numbered, pending, count = [], [], 0
    for turn in turns:
        if turn.tool_calls:
            calls = []
            for call in turn.tool_calls:
                calls.append(call if call["id"] else {**call, "id": f"call{count:05d}"})
                count += 1
            turn = replace(turn, tool_calls=tuple(calls))
            pending = [call["id"] for call in calls]
        elif turn.role == "tool":
            if not turn.tool_call_id:
                if not pending:
                    raise BadRecord("", "a tool turn answers no tool call")
                turn = replace(turn, tool_call_id=pending[0])
            pending = [name for name in pending if name != turn.tool_call_id]
        numbered.append(turn)
    return numbered


def _read_tools(tools) -> tuple[dict, ...]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRecord("", f"tools are no JSON ({error})") from error
    return tuple(_read_tool(tool) for tool in _list(tools, "tools"))


def _read_tool(tool) -> dict:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord("", f"a tool is {_shown(tool)}; it must have function.name, description and parameters")
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function.get("description") or "",
            "parameters": function.get("parameters") or {},
        },
    }


def _list(value, label: str) -> list | tuple:
    if value is not None and not isinstance(value, (list, tuple)):
        raise BadRecord("", f"{label} is {_shown(value)}; it must be a list")
    return value or ()


def _name(fields: dict, key: str, label: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRecord("", f"{label}: {key} is {_shown(value)}; it must be text")
    return value


def _shown(value) -> str:
    """A value as JSON writes it, what JSON has not as Python does."""
    text = json.dumps(value, ensure_ascii=False, default=repr, skipkeys=True)
    return text if len(text) <= 80 else text[:77] + "..."
