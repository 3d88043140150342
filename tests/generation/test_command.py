"""``m3kernels generate`` and Megatron-Bridge's script: what they print, write and refuse."""

import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_checkpoints
from PIL import Image
from test_session import Script, ids

from m3kernels.cli import main
from m3kernels.models.generation import engine

NEW = 8
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "conversion" / "hf_to_megatron_generate_vlm.py"


def script():
    spec = importlib.util.spec_from_file_location("hf_to_megatron_generate_vlm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generate(*arguments):
    options = ["--hf-model-path", str(tiny_checkpoints.checkpoint()), "--device", "cpu", "--max-new-tokens", str(NEW)]
    return main(["generate", *options, *map(str, arguments)])


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.effect_noise((90, 60), 80).convert("RGB").save(path)
    return path


@pytest.fixture
def scripted(monkeypatch):
    """Has the model say what a test tells it to."""

    def say(*rows, **options):
        monkeypatch.setattr(engine, "Generator", lambda model, **kv: Script(*rows, **options))

    return say


def test_one_prompt_with_images(capsys, picture):
    assert generate("--prompt", "A [IMG] B [IMG]", "--image-path", picture, "--image_path", picture) == 0
    out, err = capsys.readouterr()
    prompt = tiny_checkpoints.chat().prompt("A [IMG] B [IMG]", [picture, picture])
    answer = tiny_checkpoints.expected(prompt, NEW)
    assert out == f"Prompt: A [IMG] B [IMG]\nImage: {picture}\nImage: {picture}\nCompletion: {answer}\n"
    assert re.search(
        rf"new tokens \({len(prompt.tokens)} tokens in, .*first token after [\d.]+ s, then [\d,.]+ tokens/s", err
    )


def test_both_spellings_and_every_source_of_weights(capsys, tmp_path):
    arguments = ["--checkpoint_path", tiny_checkpoints.native(), "--prompt=Hello_you", "--stream", "--top_p", "0.5"]
    assert generate(*arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("Prompt: Hello_you\nCompletion: ") and out.endswith("\n") and len(out) > 30
    assert generate("--prompt", "Hello", "--adapter", tiny_checkpoints.adapter(), "--output", tmp_path / "a.jsonl") == 0
    out = capsys.readouterr().out
    line = json.loads((tmp_path / "a.jsonl").read_text())
    assert out == f"Prompt: Hello\nCompletion: {line['text']}\n"
    assert line["text"] != tiny_checkpoints.expected(tiny_checkpoints.chat().prompt("Hello"), NEW)


def test_streamed_text_is_the_answer(capsys):
    assert generate("--prompt", "Hello", "--stream") == 0
    answer = tiny_checkpoints.expected(tiny_checkpoints.chat().prompt("Hello"), NEW)
    assert capsys.readouterr().out == f"Prompt: Hello\nCompletion: {answer}\n"


def test_drawn_tokens_go_by_the_seed(capsys):
    said = []
    for seed in (1, 1, 2):
        assert generate("--prompt", "Hello", "--temperature", "1.5", "--top-p", "0.95", "--seed", seed) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    # the likeliest alone
    assert generate("--prompt", "Hello", "--temperature", "1.5", "--top_k", "1", "--seed", "5") == 0
    answer = tiny_checkpoints.expected(tiny_checkpoints.chat().prompt("Hello"), NEW)
    assert capsys.readouterr().out == f"Prompt: Hello\nCompletion: {answer}\n"


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "streamed"])
def test_reasoning_stands_apart(capsys, scripted, stream):
    scripted([34, *ids("Let me see."), 35, *ids("\nIt is 3.")], ends="stop")
    assert generate("--prompt", "1+2", *stream) == 0
    out, err = capsys.readouterr()
    assert out == "Prompt: 1+2\nReasoning: Let me see.\nCompletion: It is 3.\n"
    assert "ended by itself" in err


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "streamed"])
def test_ctrl_c_leaves_what_there_is(capsys, scripted, stream, tmp_path):
    scripted(ids("one two three four five six seven eight nine"), broken=1 if not stream else 9)
    assert generate("--prompt", "A", "--output", tmp_path / "a.jsonl", *stream) == 130
    out, err = capsys.readouterr()
    line = json.loads((tmp_path / "a.jsonl").read_text())
    assert out == f"Prompt: A\nCompletion: {line['text']}\n" and line["text"].startswith("one t")
    assert line["reason"] == "interrupted" and "interrupted" in err


@pytest.mark.slow
def test_a_signal_ends_a_stream_with_what_there_is(tmp_path):
    """A process and a real Ctrl-C: the answer would never end."""
    code = (
        # a shell's background jobs ignore Ctrl-C, and so does what they start
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.path[:0] = sys.argv[1].split(',')\n"
        "from test_session import Script, ids\n"
        "from m3kernels.cli import main; from m3kernels.models.generation import engine\n"
        "class Slow(Script):\n"
        "    def __iter__(self):\n"
        "        for burst in super().__iter__(): yield burst; time.sleep(0.05)\n"
        "engine.Generator = lambda model, **kv: Slow(ids('word ' * 10_000))\n"
        "sys.exit(main(['generate', '--hf-model-path', sys.argv[2], '--device', 'cpu', '--prompt', 'A', '--stream']))\n"
    )
    paths = [
        ROOT / "tests",
        *(ROOT / "tests" / name for name in ("finetune", "generation", "models")),
        ROOT / "examples",
    ]
    command = [sys.executable, "-c", code, ",".join(map(str, paths)), str(tiny_checkpoints.checkpoint())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    begun = process.stdout.readline() + process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert (begun + out).startswith("Prompt: A\nCompletion: word word") and "interrupted" in err


def test_a_file_of_prompts(capsys, tmp_path, picture):
    rows = [
        {"prompt": "Hello", "id": 7},
        {"prompt": "What?", "images": [str(picture)]},
        {"messages": [{"role": "user", "content": "Bye"}]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = tiny_checkpoints.chat()
    prompts = [chat.prompt("Hello"), chat.prompt("What?", [picture]), chat.prompt("Bye")]
    expected = [tiny_checkpoints.expected(prompt, NEW) for prompt in prompts]
    for size in (1, 2, 3):
        assert generate("--batch-file", tmp_path / "p.jsonl", "--batch-size", size) == 0
        out, err = capsys.readouterr()
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line["text"] for line in lines] == expected
        assert [line["prompt_tokens"] for line in lines] == [len(prompt.tokens) for prompt in prompts]
        assert [line.get("id") for line in lines] == [7, None, None] and lines[0]["reasoning"] is None
        assert re.search(r"3 prompts, \d+ new tokens in [\d.]+ s: [\d,.]+ tokens/s, first token after", err)
    output = tmp_path / "out.jsonl"
    assert generate("--batch-file", tmp_path / "p.jsonl", "--output", output) == 0
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == expected
    assert capsys.readouterr().out == ""
    assert generate("--batch-file", tmp_path / "p.jsonl", "--output", output) == 2
    assert "exists: choose another file, or pass --overwrite" in capsys.readouterr().err
    assert generate("--batch-file", tmp_path / "p.jsonl", "--output", output, "--overwrite") == 0


def test_an_interrupted_file_keeps_what_was_answered(capsys, scripted, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "A"}\n{"prompt": "B"}\n{"prompt": "C"}\n')
    scripted(ids("one two three four five six seven eight nine ten"), broken=1)
    assert generate("--batch-file", tmp_path / "p.jsonl", "--batch-size", 1) == 130
    out, err = capsys.readouterr()
    (line,) = map(json.loads, out.splitlines())
    assert line["reason"] == "interrupted" and line["text"].startswith("one")
    assert "1 of 3 prompts, " in err


def no_weights(monkeypatch):
    """Fails a test that begins to read weights."""
    from m3kernels.models.generation import loading

    monkeypatch.setattr(loading, "load", lambda *args, **options: pytest.fail("weights were read"))


REFUSED = [
    ([], "give either --prompt TEXT or --batch-file FILE"),
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt", "A", "--batch-file", "x"], "give either"),
    (["--batch-file", "none.jsonl"], "none.jsonl does not exist"),
    (["--batch-file", "x", "--image-path", "a.png"], "--image-path goes with --prompt"),
    (["--batch-file", "x", "--stream"], "--stream goes with --prompt"),
    (["--batch-file", "x", "--batch-size", "0"], "--batch-size 0; allowed: 1"),
    (["--prompt", "A", "--image-path", "none.png"], "none.png does not exist"),
    (["--prompt", "A", "--image-path", "http://127.0.0.1:80/a.png"], "no public address"),
    (["--prompt", "A", "--image-path", "file:///etc/passwd"], "image URLs are http:// or https://"),
    (["--prompt", "A [IMG]"], "1 [IMG] for 0 images"),
    (["--prompt", "A", "--stop", ""], "allowed: texts of one character"),
    (["--prompt", "A", "--temperature", "-1"], "temperature=-1.0; allowed"),
    (["--prompt", "A", "--temperature", "nan"], "temperature=nan; allowed"),
    (["--prompt", "A", "--top-p", "0"], "top_p=0.0; allowed"),
    (["--prompt", "A", "--top-k", "-1"], "top_k=-1; allowed"),
    (["--prompt", "A", "--max-new-tokens", "0"], "max_new_tokens=0; allowed"),
    (["--prompt", "A", "--max-new-tokens", "125"], "max_new_tokens is 125: together 129, and the model has 128"),
    (["--prompt", "A " * 200], "the model has 128 positions; shorten the prompt\n"),
    (["--prompt", "A", "--checkpoint-path", "none"], "none does not exist"),
    (["--prompt", "A", "--adapter", "none"], "holds no adapter_model.safetensors"),
    (["--prompt", "A", "--hf-model-path", "none"], "none is no folder"),
    (["--prompt", "A", "--tp", "2"], "start with --nproc-per-node=2"),
    (["--prompt", "A", "--tp", "0"], "--tp 0; allowed: 1 and more"),
    (["--prompt", "A", "--shipped-system"], "no SYSTEM_PROMPT.txt"),
    (["--prompt", "A", "--raw", "--system", "S"], "this prompt is raw"),
    (["--prompt", "A", "--output", "none/a.jsonl"], "the folder none does not exist"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, reason", REFUSED, ids=[" ".join(a)[:40] for a, _ in REFUSED])
def test_what_cannot_be_done_is_refused_before_weights_are_read(arguments, reason, capsys, monkeypatch):
    no_weights(monkeypatch)
    assert generate(*arguments) == 2
    out, err = capsys.readouterr()
    # older transformers show a bar while the fixture's checkpoint is written
    said = err.rpartition("\r")[2].splitlines()[-1] if "\r" in err else err
    assert reason in said and said.startswith("m3kernels generate: ") and "Traceback" not in err and out == ""


def test_bad_lines_are_refused_before_weights_are_read(capsys, monkeypatch, tmp_path):
    no_weights(monkeypatch)
    long = {"prompt": "A " * 200}
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "A"}}\n{{"promt": "A"}}\n{json.dumps(long)}\n')
    assert generate("--batch-file", tmp_path / "p.jsonl") == 2
    err = capsys.readouterr().err
    assert "2 of 3 prompts are bad" in err and "p.jsonl:2: unknown field" in err and "p.jsonl:3 has " in err


def test_unknown_flags_exit_2(capsys):
    with pytest.raises(SystemExit) as exit:
        generate("--promt", "A")
    assert exit.value.code == 2 and "--promt" in capsys.readouterr().err


def test_a_base_checkpoint_is_raw_and_says_so(capsys, tmp_path):
    base = tiny_checkpoints.copy(tiny_checkpoints.checkpoint(), tmp_path / "base")
    (base / "tokenizer_config.json").write_text("{}")
    options = [
        "generate",
        "--hf-model-path",
        str(base),
        "--device",
        "cpu",
        "--max-new-tokens",
        "4",
        "--prompt",
        "The cat",
    ]
    assert main(options) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == "Completion: " + tiny_checkpoints.expected(
        tiny_checkpoints.chat().prompt("The cat", raw=True), 4
    )
    assert "has no chat template" in err
    assert main([*options, "--no-raw"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == "Completion: " + tiny_checkpoints.expected(
        tiny_checkpoints.chat().prompt("The cat"), 4
    )
    assert "chat template" not in err


def test_megatron_bridges_script(capsys, picture):
    flags = [
        "--hf_model_path",
        str(tiny_checkpoints.checkpoint()),
        "--megatron_model_path",
        str(tiny_checkpoints.native()),
        "--device",
        "cpu",
    ]
    flags += ["--image_path", str(picture), "--max_new_tokens", "5", "--tp", "1", "--pp", "1", "--trust_remote_code"]
    assert script().main(flags) == 0
    out, err = capsys.readouterr()
    answer = tiny_checkpoints.expected(tiny_checkpoints.chat().prompt("Describe this image.", [picture]), 5)
    assert out.endswith(f"Completion: {answer}\n") and "--trust-remote-code has no effect" in err
    for refused, reason in (("--pp", "pipeline stages"), ("--ep", "no experts"), ("--etp", "no experts")):
        with pytest.raises(SystemExit) as exit:
            script().main([*flags, refused, "2"])
        assert exit.value.code == 2 and reason in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_say_what_one_says(picture, tmp_path):
    output = tmp_path / "a.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    command += [
        "--hf_model_path",
        str(tiny_checkpoints.checkpoint()),
        "--tp",
        "2",
        "--image_path",
        str(picture),
        "--device",
        "cpu",
    ]
    command += ["--max_new_tokens", "5", "--output", str(output), "--prompt", "Hello"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    answer = tiny_checkpoints.expected(tiny_checkpoints.chat().prompt("Hello", [picture]), 5)
    assert done.stdout == f"Prompt: Hello\nImage: {picture}\nCompletion: {answer}\n"
    assert json.loads(output.read_text())["text"] == answer


def test_lines_are_json_in_every_encoding(tmp_path, monkeypatch):
    """Also of an id that UTF-8 does not hold."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "A", "id": "\ud800\U0001f600é"}))
    for encoding in ("ascii", "latin-1", "utf-8"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        assert generate("--batch-file", tmp_path / "p.jsonl") == 0
        assert json.loads(raw.getvalue().decode(encoding))["id"] == "\ud800\U0001f600é"
    assert generate("--batch-file", tmp_path / "p.jsonl", "--output", tmp_path / "out.jsonl") == 0
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["id"] == "\ud800\U0001f600é"


def test_a_closed_standard_output(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)
    assert generate("--prompt", "A", "--output", tmp_path / "out.jsonl") == 0
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["text"]


def test_output_is_replaced_once_the_model_is_there(monkeypatch, tmp_path):
    from m3kernels.models.generation import loading

    def fails(*args, **options):
        raise OSError("the disk is gone")

    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text("before\n")
    with monkeypatch.context() as broken:
        broken.setattr(loading, "load", fails)
        assert generate("--prompt", "A", "--output", old, "--overwrite") == 2
        assert generate("--prompt", "A", "--output", new) == 2
    assert old.read_text() == "before\n" and not new.exists()
    assert generate("--prompt", "A", "--output", old, "--overwrite") == 0
    assert len(old.read_text(encoding="utf-8").splitlines()) == 1 and "before" not in old.read_text(encoding="utf-8")
