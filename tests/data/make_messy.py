r"""Makes messy.jsonl beside it from the table below: a defect or oddity a line, and what is to become of it.

    .venv/bin/python tests/data/make_messy.py

The file holds bytes that editors mend without asking (invalid UTF-8, CRLF, byte order marks), so it is not edited
by hand: change the table and make it again. The expectations are judgements about the data, not copied from the
code; they hold for ``tiny.byte_pairs()``, where words such as " the" and " cat" are one token each, cut to
64 tokens on the right.
"""

from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("messy.jsonl")
LIMIT = 64  # tokens
INDEXED, DUPLICATE = "indexed", "duplicate"
# Well-formed, but nothing to train on: set aside even where malformed lines are refused.
UNTRAINABLE = ("blank_line", "empty_text", "empty_target", "no_target")


@dataclass(frozen=True)
class Line:
    """``outcome`` of reading: indexed, duplicate, or the reason why it is set aside.

    What is read may still not run, for a reason of its own: ``rows``, in any index; ``alternating``, where the chat
    template wants user and assistant by turns; ``answers``, in an index of kind difference; ``chat_answers``, the
    same where a chat template writes something in front of every answer.
    """

    name: str
    raw: bytes
    outcome: str = INDEXED
    rows: str | None = None
    alternating: str | None = None
    answers: str | None = None
    chat_answers: str | None = None
    cut: bool = False  # longer than LIMIT, and the index counts it as truncated


def chat(*turns: bytes) -> bytes:
    """``b"user: hello"`` and so on, of strings as they stand in JSON."""
    messages = (b'{"role": "%s", "content": "%s"}' % tuple(turn.split(b": ", 1)) for turn in turns)
    return b'{"messages": [' + b", ".join(messages) + b"]}"


def text(name: str, raw: bytes, *, rows: str | None = None, cut: bool = False) -> Line:
    """Text that is read; it has no prompt that a base could answer."""
    return Line(name, raw, rows=rows, answers="no_prompt", chat_answers="no_prompt", cut=cut)


def oneself(name: str, raw: bytes) -> Line:
    """A conversation that begins with the answer: only a chat template puts something in front of it."""
    return Line(name, raw, alternating="template_refuses", answers="no_prompt")


def irregular(name: str, raw: bytes) -> Line:
    """A conversation that runs, except where the template wants user and assistant by turns."""
    return Line(name, raw, alternating="template_refuses")


BOM = b"\xef\xbb\xbf"

LINES = [
    # --- the bytes of a line ----------------------------------------------------------------------------
    Line("byte order mark at the start", BOM + b'{"prompt": "the question", "completion": " the answer"}'),
    Line("CRLF line end", b'{"prompt": "the question", "completion": " a cat"}\r'),
    Line("nothing between two line ends", b"", "blank_line"),
    Line("only spaces and tabs", b" \t  ", "blank_line"),
    Line("only a carriage return", b"\r", "blank_line"),
    Line("form feed between pages", b"\x0c", "blank_line"),
    Line("only a byte order mark", BOM, "blank_line"),
    Line("only a no-break space", b"\xc2\xa0", "not_json"),
    Line("byte order mark in the middle of the file", BOM + b'{"prompt": "two files", "completion": " in one"}'),
    Line("two byte order marks", BOM + BOM + b'{"text": "the cat sat"}', "not_json"),
    Line("whitespace around the object", b' \t{"prompt": "wide", "completion": " margins"}  '),
    Line("invalid UTF-8", b'{"text": "the c\xff\xfe"}', "not_utf8"),
    Line("Latin-1", b'{"text": "caf\xe9 au lait"}', "not_utf8"),
    Line("UTF-8 cut off inside a character", b'{"text": "\xf0\x9f\x98"}', "not_utf8"),
    Line("surrogates written as UTF-8", b'{"text": "\xed\xa0\xbd\xed\xb8\x80"}', "not_utf8"),
    Line("UTF-16", '{"text": "a"}'.encode("utf-16"), "not_utf8"),
    Line("bytes of another format", b"PAR1\x15\x04\x15\x90\xff", "not_utf8"),
    Line("only NUL bytes, as after a crash", b"\x00" * 16, "not_json"),
    Line("NUL byte in a string", b'{"text": "the\x00cat"}', "not_json"),
    Line("raw tab in a string", b'{"text": "the\tcat"}', "not_json"),
    Line("lines that end in a carriage return", b'{"text": "one"}\r{"text": "two"}', "not_json"),
    # --- the JSON ---------------------------------------------------------------------------------------
    Line("broken JSON", b'{"text": the cat}', "not_json"),
    Line("truncated JSON", b'{"prompt": "the question", "completion": " the ans', "not_json"),
    Line("trailing comma inside", b'{"text": "the cat",}', "not_json"),
    Line("trailing comma behind", b'{"text": "the cat"},', "not_json"),
    Line("two objects on one line", b'{"text": "one"} {"text": "two"}', "not_json"),
    Line("Python's repr", b"{'text': 'the cat', 'bad': None}", "not_json"),
    Line("a comment", b'{"text": "the cat"} // checked', "not_json"),
    Line("an escape that is none", rb'{"text": "C:\xampp"}', "not_json"),
    Line("a header of CSV", b"prompt,completion", "not_json"),
    Line("first line of printed JSON", b"{", "not_json"),
    Line("NaN", b'{"prompt": "q", "completion": " a", "score": NaN}', "not_json"),
    Line("Infinity", b'{"prompt": "q", "completion": " a", "score": -Infinity}', "not_json"),
    Line("a number beyond float64", b'{"prompt": "q", "completion": " a", "score": 1e999}', "not_json"),
    Line("an integer that no reader takes", b'{"text": "a cat", "n": ' + b"9" * 5000 + b"}", "not_json"),
    Line("a huge integer", b'{"prompt": "how many", "completion": " cats", "n": ' + b"9" * 400 + b"}"),
    Line("a list", b'[{"text": "the cat"}]', "not_an_object"),
    Line("a number", b"42", "not_an_object"),
    Line("a string", b'"the cat sat on the mat"', "not_an_object"),
    Line("JSON inside a string", rb'"{\"text\": \"the cat\"}"', "not_an_object"),
    Line("null", b"null", "not_an_object"),
    Line("true", b"true", "not_an_object"),
    Line("lone surrogate", rb'{"text": "the \ud83d cat"}', "not_utf8"),
    Line("lone surrogate in a key of the metadata", rb'{"text": "the cat", "\udfff": 1}', "not_utf8"),
    Line("emoji split between prompt and completion", rb'{"prompt": "\ud83d", "completion": "\ude00"}', "not_utf8"),
    Line("metadata nested 400 deep", b'{"text": "the mat", "m": ' + b"[" * 400 + b"]" * 400 + b"}", "too_deep"),
    Line(
        "metadata nested 50 deep", b'{"prompt": "deep", "completion": " in", "m": ' + b"[" * 50 + b"]" * 50 + b"}"
    ),
    # --- the shape --------------------------------------------------------------------------------------
    Line("an empty object", b"{}", "unknown_format"),
    Line("no known key", b'{"instruction": "sit", "output": "the cat sat"}', "unknown_format"),
    Line("known key in capitals", b'{"Text": "the cat"}', "unknown_format"),
    Line("turns in a key of another tool", b'{"conversations": [{"from": "gpt", "value": "a"}]}', "unknown_format"),
    Line("prompt alone", b'{"prompt": "the question"}', "unknown_format"),
    Line("completion alone", b'{"completion": " the answer"}', "unknown_format"),
    Line("a preference pair", b'{"prompt": "q", "chosen": "a", "rejected": "b"}', "unknown_format"),
    Line(
        "text beside messages", b'{"text": "a", "messages": [{"role": "user", "content": "q"}]}', "unknown_format"
    ),
    Line(
        "text beside prompt and completion", b'{"text": "qa", "prompt": "q", "completion": "a"}', "unknown_format"
    ),
    Line("null in the columns of other forms", b'{"text": "a", "messages": null}', "unknown_format"),
    Line("text is null", b'{"text": null}', "not_text"),
    Line("text is a list of texts", b'{"text": ["the cat", "the mat"]}', "not_text"),
    Line("prompt is a number", b'{"prompt": 7, "completion": " seven"}', "not_text"),
    Line("completion is null", b'{"prompt": "the question", "completion": null}', "not_text"),
    Line("completion is true", b'{"prompt": "is it", "completion": true}', "not_text"),
    Line(
        "prompt and completion as messages",
        b'{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}',
        "not_text",
    ),
    Line("messages is an object", b'{"messages": {"role": "user", "content": "q"}}', "bad_messages"),
    Line("messages is null", b'{"messages": null}', "bad_messages"),
    Line("messages is a string", rb'{"messages": "[{\"role\": \"user\"}]"}', "bad_messages"),
    Line("no messages", b'{"messages": []}', "bad_messages"),
    Line("a message is a string", b'{"messages": ["the question", "the answer"]}', "bad_messages"),
    # --- messages ---------------------------------------------------------------------------------------
    Line("unknown role", chat(b"human: the question", b"gpt: the answer"), "bad_role"),
    Line("role in capitals", chat(b"User: the question", b"Assistant: the answer"), "bad_role"),
    Line("role with a space", chat(b"user: the question", b"assistant : the answer"), "bad_role"),
    Line("a tool speaks", chat(b"user: q", b"tool: 42", b"assistant: a"), "bad_role"),
    Line("no role", b'{"messages": [{"content": "q"}, {"role": "assistant", "content": "a"}]}', "bad_role"),
    Line("role is an object", b'{"messages": [{"role": {}, "content": "q"}]}', "bad_role"),
    Line("no content", b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "not_text"),
    Line("content is null", b'{"messages": [{"role": "assistant", "content": null}]}', "not_text"),
    Line(
        "content with an image",
        b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}]},'
        b' {"role": "assistant", "content": "a cat"}]}',
        "not_text",
    ),
    Line(
        "content as a list of texts",
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},'
        b' {"role": "assistant", "content": "a"}]}',
        "not_text",
    ),
    Line(
        "images beside the content of a message",
        b'{"messages": [{"role": "user", "content": "q", "images": ["cat.png"]},'
        b' {"role": "assistant", "content": "a"}]}',
        "unsupported_message",
    ),
    Line(
        "tool calls",
        b'{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}]}',
        "unsupported_message",
    ),
    Line(
        "weight of a turn",
        b'{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}',
        "unsupported_message",
    ),
    Line("no assistant turn", chat(b"system: be brief", b"user: the question"), "no_target"),
    Line(
        "every assistant turn empty",
        chat(b"user: q", b"assistant: ", b"user: r", rb"assistant: \n"),
        "empty_target",
    ),
    Line("one of two assistant turns empty", chat(b"user: q", b"assistant: ", b"user: r", b"assistant: s")),
    Line("last assistant turn empty", chat(b"user: q", b"assistant: the answer", b"user: r", b"assistant: ")),
    Line("an ordinary conversation", chat(b"user: the question", b"assistant: the answer")),
    oneself("assistant first", chat(b"assistant: the cat sat", b"user: thanks")),
    oneself("assistant alone", chat(b"assistant: the cat sat on the mat")),
    irregular("two assistant turns in a row", chat(b"user: q", b"assistant: the cat", b"assistant: the mat")),
    irregular("two user turns in a row", chat(b"user: the question", b"user: please", b"assistant: the answer")),
    irregular("system in the middle", chat(b"user: q", b"assistant: a", b"system: be brief", b"assistant: b")),
    irregular("system first", chat(b"system: be brief", b"user: the question", b"assistant: the answer")),
    Line("last turn from the user", chat(b"user: the cat", b"assistant: the mat", b"user: thanks")),
    Line("the question is empty", chat(b"user: ", b"assistant: the answer")),
    Line("marks of the chat template in the content", chat(b"user: q<|end|><|assistant|>x", b"assistant: a")),
    # --- what there is to train on ----------------------------------------------------------------------
    Line("empty text", b'{"text": ""}', "empty_text"),
    Line("text of whitespace", rb'{"text": " \n\t\u00a0\u3000"}', "empty_text"),
    Line("empty completion", b'{"prompt": "the question", "completion": ""}', "empty_target"),
    Line("the same empty completion again", b'{"prompt": "the question", "completion": ""}', "empty_target"),
    Line("completion of whitespace", rb'{"prompt": "the question", "completion": " \n\n "}', "empty_target"),
    Line("prompt and completion empty", b'{"prompt": "", "completion": ""}', "empty_target"),
    Line(
        "empty prompt",
        b'{"prompt": "", "completion": "the cat sat"}',
        answers="no_prompt",
        chat_answers="no_prompt",
    ),
    Line("empty prompt and a completion of one token", b'{"prompt": "", "completion": "the"}', rows="no_target"),
    Line("completion of one token", b'{"prompt": "the", "completion": " cat"}'),
    Line(
        "completion that grows into the prompt's only token",
        b'{"prompt": "t", "completion": "he"}',
        rows="no_target",
    ),
    Line("completion that grows into the prompt's last token", b'{"prompt": "the c", "completion": "at"}'),
    text("text of two tokens", b'{"text": "the cat"}'),
    text("text of one token", b'{"text": "the"}', rows="no_target"),
    text("text of one special token", b'{"text": "</s>"}', rows="no_target"),
    text("text that is the beginning of a sequence", b'{"text": "<s>"}', rows="no_target"),
    text("text of special tokens", b'{"text": "<s></s><|end|>"}'),
    Line("prompt and completion of special tokens", b'{"prompt": "<s>", "completion": "</s>"}'),
    text("text of exactly the limit", b'{"text": "the' + b" cat" * (LIMIT - 1) + b'"}'),
    text("text one token beyond the limit", b'{"text": "the' + b" mat" * LIMIT + b'"}', cut=True),
    Line("answer that ends at the limit", b'{"prompt": "the' + b" cat" * (LIMIT - 2) + b'", "completion": " sat"}'),
    Line(
        "answer that begins before the limit",
        b'{"prompt": "the' + b" cat" * (LIMIT - 2) + b'", "completion": " sat on"}',
        cut=True,
    ),
    Line(
        "answer beyond the limit",
        b'{"prompt": "the' + b" cat" * (LIMIT - 1) + b'", "completion": " sat"}',
        rows="target_cut_off",
    ),
    Line(
        "last of two answers beyond the limit",
        chat(b"user: q", b"assistant: the cat", b"user:" + b" the" * LIMIT, b"assistant: the mat"),
        answers="no_answer",
        chat_answers="no_answer",
        cut=True,
    ),
    # --- characters -------------------------------------------------------------------------------------
    Line("control characters", rb'{"prompt": "\u0001\u0007\u001b[31m", "completion": " \u0008\u007f"}'),
    Line("NUL character", rb'{"prompt": "the\u0000", "completion": "\u0000cat\u0000"}'),
    Line("completion of zero-width characters", rb'{"prompt": "q", "completion": "\u200b\u200d\ufeff"}'),
    Line("text turned right to left", rb'{"prompt": "\u202eabc\u202c", "completion": " \u05d0\u05d1"}'),
    Line(
        "separators that are line ends elsewhere",
        '{"prompt": "one\u2028two", "completion": "\u0085three"}'.encode(),
    ),
    Line("emoji of several code points", '{"prompt": "👩", "completion": "\u200d👧🏽"}'.encode()),
    Line("accent apart from its letter", '{"prompt": "cafe", "completion": "\u0301"}'.encode()),
    Line("replacement characters", '{"prompt": "caf\ufffd", "completion": " \ufffd\ufffd"}'.encode()),
    Line("code points beyond Unicode's assigned", rb'{"prompt": "\uffff", "completion": "\udbff\udfff"}'),
    # --- metadata ---------------------------------------------------------------------------------------
    Line(
        "metadata with the names of our own fields",
        b'{"prompt": "whose", "completion": " mine", "id": "0", "places": [], "content": 1, "metadata": {"id": 2},'
        b' "score": "high", "rank": null, "__class__": "Example"}',
    ),
    Line("metadata without a name", b'{"": {"": []}, "prompt": "no", "completion": " name"}'),
    Line("metadata in other forms' keys", b'{"prompt": "form", "completion": " one", "message": [], "texts": 0}'),
    # --- duplicates -------------------------------------------------------------------------------------
    Line("exact duplicate", b'{"prompt": "the question", "completion": " a cat"}', DUPLICATE),
    Line("duplicate with other metadata", b'{"prompt": "the", "completion": " cat", "source": "b"}', DUPLICATE),
    Line("duplicate with other whitespace and order", b'{"completion" :" cat",\t"prompt":"the"}', DUPLICATE),
    Line("duplicate in escapes", rb'{"pr\u006fmpt": "the", "completion": "\u0020cat"}', DUPLICATE),
    Line("duplicate conversation", chat(b"user: the question", b"assistant: the answer"), DUPLICATE),
    Line("duplicate of one that cannot run", b'{"text": "the", "again": true}', DUPLICATE),
    Line("the same words in another form", chat(b"user: the", b"assistant:  cat")),
    Line(
        "the same words cut elsewhere",
        b'{"prompt": "", "completion": "the cat"}',
        answers="no_prompt",
        chat_answers="no_prompt",
    ),
    Line("the same words but for a space", b'{"prompt": "the ", "completion": "cat"}'),
    Line("no line end after the last line", b'{"prompt": "the last", "completion": " line"}'),
]


def data() -> bytes:
    return b"\n".join(line.raw for line in LINES)


if __name__ == "__main__":
    FILE.write_bytes(data())
