"""Ids to text as they come: joined it is the decode of the whole, however they come."""

import random

import pytest
from data_folders import mistral_folder, processor_folder

from m3kernels.models.generation.chat import Chat
from m3kernels.models.generation.prompt import GenerationError
from m3kernels.models.generation.text import Detokenizer, Piece, Reader

THINK, END_THINK, INST = 34, 35, 3
BYTE = 1000
CHATS = {"mistral": Chat.open(mistral_folder()), "processor": Chat.open(processor_folder())}
BOTH = pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)


class Letters:
    """A vocabulary whose ids are code points; without control tokens for thoughts."""

    thinks = False

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    def control(self, token):
        return None


def ids(text):
    return CHATS["mistral"].encoder.chat.text(text)


def bursts(tokens, rng):
    """The ids in random parts, some of them empty."""
    at = 0
    while at < len(tokens):
        size = rng.choice([0, 1, 1, 2, 3, 7])
        yield tokens[at : at + size]
        at += size


def read(chat, parts, stop=()):
    """(answer, thoughts, reader) of ids that come in parts."""
    reader = Reader(chat, stop=stop)
    pieces = [piece for part in parts for piece in reader.feed(part)] + reader.finish()
    assert all(piece.text for piece in pieces) and not reader.finish()
    return *("".join(p.text for p in pieces if p.thinking == thinking) for thinking in (False, True)), reader


@BOTH
@pytest.mark.parametrize(
    "text", ["Hello there,  two spaces\n\n and", " é ü 漢字 🙂🙃 👩‍👩‍👧 ", "\ufffd a \ufffd", "x", ""]
)
def test_text_is_the_decode_of_the_whole(text, chat):
    for seed in range(10):
        assert read(chat, bursts(ids(text), random.Random(seed)))[:2] == (text, "")


@BOTH
def test_random_bytes_are_the_decode_of_the_whole(chat):
    """Broken UTF-8 as well, and control tokens in between, which are no text."""
    for seed in range(300):
        rng = random.Random(seed)
        tokens = [
            rng.choice([BYTE + rng.randrange(256), 1256 + rng.randrange(3000), BYTE + 0xE6, INST]) for _ in range(40)
        ]
        assert read(chat, bursts(tokens, rng))[0] == chat.decode(tokens), seed


@BOTH
def test_no_half_character_is_given(chat):
    tokens = [BYTE + byte for byte in "a🙂b".encode()]
    reader = Reader(chat)
    given = ["".join(piece.text for piece in reader.feed([token])) for token in tokens]
    assert given == ["a", "", "", "", "🙂", "b"]
    # a decode of each id by itself, which is what this is not
    assert "".join(chat.decode([token]) for token in tokens) == "a\ufffd\ufffd\ufffd\ufffdb"
    reader = Reader(chat)
    assert [reader.feed([token]) for token in tokens[:3]] == [[Piece("a")], [], []]
    assert reader.finish() == [Piece("\ufffd")]


def test_decoders_that_look_at_neighbours_get_them():
    """As SentencePiece's, which drop the space of a first word."""

    class Words(Letters):
        def decode(self, tokens):
            return "".join([" one", " two", "s"][token] for token in tokens).removeprefix(" ")

    for seed in range(20):
        parts = list(bursts([0, 1, 2, 1, 1, 0, 2], random.Random(seed)))
        assert read(Words(), parts)[0] == "one twos two two ones"
    detokenizer = Detokenizer(Words())
    assert [detokenizer.feed([token]) for token in (0, 1, 2)] == ["one", " two", "s"]


STOPS = [
    ("Hello END there", ["END"], "Hello "),
    ("Hello EN", ["END"], "Hello EN"),
    ("aab aaab", ["aaab"], "aab "),
    ("abcd", ["abcd", "c"], "ab"),
    ("abcd", ["cd", "bcd"], "a"),
    ("one\ntwo", ["\n"], "one"),
    ("stop", ["stop"], ""),
    ("漢字 é", ["字"], "漢"),
    ("never", ["x", "y"], "never"),
    ("ababac", ["abac"], "ab"),
]


@BOTH
@pytest.mark.parametrize("text, stop, expected", STOPS)
def test_stop_strings_end_the_text_wherever_bursts_end(text, stop, expected, chat):
    for parts in [[ids(text)], [[BYTE + byte] for byte in text.encode()], [[token] for token in ids(text)]]:
        answer, _, reader = read(chat, parts, stop)
        assert answer == expected and reader.stopped == (expected != text)
    assert reader.feed(ids("more")) == ([] if reader.stopped else [Piece("more")])


def test_what_could_begin_a_stop_string_is_held_back():
    reader = Reader(Letters(), stop=["END", "\n\n"])
    given = ["".join(piece.text for piece in reader.feed([ord(letter)])) for letter in "aEb\nEN"]
    assert given == ["a", "", "Eb", "", "\n", ""]
    assert reader.finish() == [Piece("EN")] and not reader.stopped


def first_complete(text, stop):
    """The text before the stop string that is complete first, found letter by letter."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


def test_random_stop_strings_are_found_as_letter_by_letter():
    stopped = 0
    for seed in range(500):
        rng = random.Random(seed)
        text = "".join(rng.choices("ab<", k=30))
        stop = ["".join(rng.choices("ab<", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
        answer, _, reader = read(Letters(), bursts([ord(letter) for letter in text], rng), stop)
        assert answer == first_complete(text, stop), (text, stop)
        stopped += reader.stopped
    assert 300 < stopped < 500


@BOTH
def test_thoughts_are_apart_by_their_control_tokens(chat):
    assert chat.thinks
    tokens = [THINK, *ids("Let me see.\nEND"), END_THINK, *ids("It is <think>3")]
    for seed in range(10):
        assert read(chat, bursts(tokens, random.Random(seed)))[:2] == ("It is <think>3", "Let me see.\nEND")
    reader = Reader(chat)
    assert reader.feed(tokens[:4]) == [Piece(chat.decode(tokens[1:4]), thinking=True)]
    # a stop string ends thoughts, too, but none reaches over their end
    assert read(chat, [tokens], ["see", "3"])[:2] == ("", "Let me ")
    assert read(chat, [tokens], ["END" + "It"])[0] == "It is <think>3"
    # cut off while thinking: a half character and a held-back beginning come out as they are
    answer, thoughts, _ = read(chat, [[THINK, *ids("No EN"), BYTE + 0xE6]], ["END"])
    assert (answer, thoughts) == ("", "No EN\ufffd")
    assert read(chat, [[BYTE + 0xE6, THINK, BYTE + 0xBC]])[:2] == ("\ufffd", "\ufffd")


MARKS = [
    ("<think>\nHm.\n</think>\n\nYes", "\n\nYes", "\nHm.\n"),
    ("  <think>a</think>b", "  b", "a"),
    ("[THINK]a[/THINK]b</think>", "b</think>", "a"),
    ("<think>never ends</thin", "", "never ends</thin"),
    ("<thin", "<thin", ""),
    ("  ", "  ", ""),
    ("A <think>b</think>", "A <think>b</think>", ""),
    ("<think></think>", "", ""),
    ("<think>a<think>b</think>c<think>d", "c<think>d", "a<think>b"),
]


@pytest.mark.parametrize("text, answer, thoughts", MARKS)
def test_older_thoughts_are_text_at_the_beginning(text, answer, thoughts):
    tokens = [ord(letter) for letter in text]
    for seed in range(20):
        assert read(Letters(), bursts(tokens, random.Random(seed)), ["@@"])[:2] == (answer, thoughts)


def test_stop_strings_and_marks_in_text():
    for parts in ([list(map(ord, "<think>a</think>bXc"))], [[ord(letter)] for letter in "<think>a</think>bXc"]):
        assert read(Letters(), parts, ["X"])[:2] == ("b", "a")
        assert read(Letters(), parts, ["</th"])[:2] == ("", "a")
        assert read(Letters(), parts, ["ink>a"])[:2] == ("bXc", "a")
        assert read(Letters(), parts, ["<th"])[:2] == ("", "")


@pytest.mark.parametrize("stop", [[""], ["a", 3], ""])
def test_stop_strings_have_a_character(stop):
    with pytest.raises(GenerationError, match="allowed: texts of one character"):
        Reader(Letters(), stop=stop)
