"""docs/generation.md says what the code does: its commands run, from nothing, in its order."""

import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from m3kernels.cli import main
from m3kernels.cli.generate import parser_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
# what stands between a mark and its end, or in the block after it
STEP = re.compile(r"<!-- (runs|python|file [\w.]+) -->\n```\w*\n(.*?)```", re.DOTALL)


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str], monkeypatch) -> str:
    """What a command of the page prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if words[0] == "m3kernels":
            assert main(words[1:]) == 0, words
        else:
            assert words[0] == "python"
            monkeypatch.setattr(sys, "argv", [str(ROOT / words[1]), *words[2:]])
            with contextlib.suppress(SystemExit) as ended:
                runpy.run_path(str(ROOT / words[1]), run_name="__main__")
            assert ended is None
    return printed.getvalue()


def test_the_page_runs_from_nothing_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    printed = []
    for kind, block in STEP.findall(PAGE):
        if kind == "runs":
            printed += [run(words, monkeypatch) for words in commands(block)]
        elif kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block, "generation.md", "exec"), {})
            printed.append(out.getvalue())
        else:
            Path(kind.removeprefix("file ")).write_text(block, encoding="utf-8")
    tiny, _, converted, streamed, batch, python, script = printed
    assert tiny == "tiny\n" and converted.endswith("native\n") and batch == ""
    assert streamed.startswith("Prompt: What is the total?\nImage: receipts/train/00000.png\nCompletion: ")
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [answer.get("id") for answer in answers] == ["first", None, None]
    assert streamed.endswith(f"Completion: {answers[0]['text']}\n")
    fields = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(fields))) == set(answers[0])
    assert script.startswith("Prompt: Describe this image.") and len(python.split()) > 1


def test_flags_that_the_page_names_are_there():
    known = set(parser_of()._option_string_actions) | {"--hf_model_path", "--megatron_model_path", "--image_path"}
    known |= {"--max_new_tokens", "--trust_remote_code", "--pp", "--ep", "--etp", "--nproc-per-node", "--count"}
    known |= {"--hf-model"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGE))
    assert len(named) > 20 and named <= known, named - known


@pytest.mark.parametrize("flag", [flag for flag in parser_of()._option_string_actions if flag.startswith("--")])
def test_every_flag_has_help(flag):
    assert parser_of()._option_string_actions[flag].help
