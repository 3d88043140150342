"""The command line of a finetune: documented flags and ``KEY=VALUE`` overrides, both read by tyro into a recipe's fields."""

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from dataclasses import dataclass

from m3kernels.models.finetune.config import FinetuneConfig, FinetuneError
from m3kernels.models.ministral3.files import locate, read_json
from m3kernels.models.recipes import DEFAULT_MAKER, RECIPES, SCHEMES, size_of

# documented flags that stand for a field
ALIASES = {
    "--pretrained-checkpoint": "checkpoint.pretrained_checkpoint",
    "--hf-path": "checkpoint.pretrained_checkpoint",
    "--dataset-type": "dataset.type",
    "--peft-scheme": "peft.scheme",
    "--on-nonfinite": "train.on_nonfinite",
    "--save-dir": "dir",
    "--train-data-path": "dataset.train_data_path",
    "--valid-data-path": "dataset.valid_data_path",
    "--image-folder": "dataset.image_folder",
}
# flags without a value
SWITCHES = {
    f"--{'' if frozen else 'no-'}freeze-{name.replace('_', '-')}": (f"model.freeze_{name}", str(frozen))
    for name in ("language_model", "vision_model", "vision_projection")
    for frozen in (True, False)
}
USAGE = """usage: m3kernels finetune [3b|8b|14b] --pretrained-checkpoint DIR [--dataset-type mock|hf|local]
       [--peft-scheme none|lora|dora] [--[no-]freeze-language-model] [--[no-]freeze-vision-model]
       [--[no-]freeze-vision-projection] [--train-data-path FILE] [--valid-data-path FILE] [--image-folder DIR]
       [--save-dir DIR] [--on-nonfinite stop|skip] [--dry-run] [KEY=VALUE ...]

Without a size the checkpoint's own is taken. Several GPUs: torchrun --nproc-per-node=8 -m m3kernels.cli finetune ...
KEY=VALUE sets any field below: train.train_iters=100 is --train.train-iters 100.
"""


@dataclass(frozen=True)
class Command:
    """What a command line asks for."""

    config: FinetuneConfig
    dry_run: bool


def parse(arguments: Sequence[str]) -> Command:
    """A configuration from a command line.

    Raises:
        SystemExit: help was asked for, or an option is unknown or has a wrong value (tyro says which, and what is near).
        FinetuneError: an unknown recipe.
    """
    import tyro

    arguments = list(arguments)
    wants_help = any(a in ("-h", "--help") for a in arguments)
    dry_run = "--dry-run" in arguments
    rest = [a for a in arguments if a != "--dry-run"]
    size, rest = _size(rest)
    pairs, rest = _assignments(rest)
    _refuse_misspelt(rest)
    given = _named_fields(rest) | {name.replace("-", "_"): value for name, value in pairs}
    scheme = given.get("peft.scheme", "lora")
    # an unknown scheme is tyro's to refuse
    recipe = RECIPES[size or _size_of(given)](peft=scheme if scheme in SCHEMES else "lora")
    if given.get("dataset.type") == "hf" and "dataset.maker_name" not in given:
        recipe = dataclasses.replace(recipe, dataset=dataclasses.replace(recipe.dataset, maker_name=(DEFAULT_MAKER,)))
    if wants_help:
        print(USAGE)
    tokens = [token for name, value in pairs for token in (f"--{name}", *_values(name, value))]
    config = tyro.cli(
        FinetuneConfig,
        prog="m3kernels finetune",
        default=recipe,
        args=[*tokens, *rest],
        config=(tyro.conf.FlagConversionOff,),
        description=f"Defaults of the {size or recipe.size} recipe.",
    )
    return Command(config, dry_run)


def _size(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe that is named first or by ``--recipe``, and what is left."""
    named = None
    if arguments and not arguments[0].startswith("-") and "=" not in arguments[0]:
        named, arguments = arguments[0], arguments[1:]
    for i, argument in enumerate(arguments):
        if argument == "--recipe" and i + 1 < len(arguments):
            named, arguments = arguments[i + 1], arguments[:i] + arguments[i + 2 :]
            break
        if argument.startswith("--recipe="):
            named, arguments = argument.split("=", 1)[1], arguments[:i] + arguments[i + 1 :]
            break
    if named is None:
        return None, arguments
    size = named.removeprefix("ministral3_").removesuffix("_finetune_config").lower()
    if size not in RECIPES:
        raise FinetuneError(f"there is no recipe {named!r}; allowed: {', '.join(RECIPES)}")
    return size, arguments


def _assignments(arguments: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """(field, value) of overrides and of documented flags, and the arguments that tyro reads as they are."""
    pairs, rest, i = [], [], 0
    while i < len(arguments):
        argument = arguments[i]
        name, equals, value = argument.partition("=")
        flag = name.replace("_", "-")
        if flag in SWITCHES and not equals:
            pairs.append(SWITCHES[flag])
        elif flag in SWITCHES:
            pairs.append((SWITCHES[flag][0], value))
        elif flag in ALIASES and equals:
            pairs.append((ALIASES[flag], value))
        elif flag in ALIASES:
            if i + 1 == len(arguments):
                raise FinetuneError(f"{argument} needs a value")
            pairs.append((ALIASES[flag], arguments[i + 1]))
            i += 1
        elif equals and not argument.startswith("-"):
            pairs.append((name.lstrip("+"), value))
        else:
            rest.append(argument)
        i += 1
    return pairs, rest


def _refuse_misspelt(rest: list[str]) -> None:
    """Raises FinetuneError for what is nearly a documented flag: tyro knows only those of fields, and hints at these."""
    allowed = [*ALIASES, *SWITCHES, "--dry-run", "--recipe"]
    for argument in rest:
        flag = argument.partition("=")[0].replace("_", "-")
        near = difflib.get_close_matches(flag, allowed, n=1, cutoff=0.8)
        if flag.startswith("--") and "." not in flag and near:
            raise FinetuneError(f"there is no option {argument}; did you mean {near[0]}?")


def _named_fields(rest: list[str]) -> dict[str, str]:
    """Fields that are given as tyro's own flags, ``--peft.scheme none`` or ``--peft.scheme=none``: recipes depend on some."""
    found = {}
    for argument, after in zip(rest, [*rest[1:], ""]):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            found[name.replace("-", "_")] = value if equals else after
    return found


def _values(name: str, value: str) -> list[str]:
    """The words of a value: those of a tuple are separated by commas, brackets may stand around them."""
    kind = _type_of(name)
    if value in ("null", "none") and type(None) in typing.get_args(kind):
        value = "None"
    if typing.get_origin(kind) is not tuple:
        return [_boolean(value)]
    return [word.strip(" '\"") for word in value.strip("[]()").split(",") if word.strip()]


def _boolean(value: str) -> str:
    return {"true": "True", "false": "False"}.get(value, value)


def _type_of(name: str):
    """A field's by its dotted name; None of a name that there is not, which tyro refuses."""
    kind = FinetuneConfig
    for part in name.split("."):
        fields = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part.replace("-", "_") not in fields:
            return None
        kind = fields[part.replace("-", "_")]
    return kind


def _size_of(given: dict[str, str]) -> str:
    """By the checkpoint's config; the smallest where none is named yet."""
    source = given.get("checkpoint.pretrained_checkpoint")
    if not source:
        return "3b"
    config = read_json(locate(source) / "config.json")
    text = config.get("text_config", config)
    return size_of(text.get("num_hidden_layers", 0), text.get("hidden_size", 0))
