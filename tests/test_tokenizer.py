"""A folder's texts are read by its tokenizer.json, whatever the library would make of the kind of model."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from service.errors import Invalid
from tests import tiny
from workers.models import load
from workers.tokenizer import load as load_tokenizer

TEXTS = ["don't 12345 the  cat\n\n sat", " naïve café\t😀😀", "nai\u0308ve", "Ａ ½ x²", "<|user|> the end", ""]
FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen2")


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast, family: str) -> str:
    tiny.config(family).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ids(folder: str, text: str) -> list[int]:
    """What tokenizer.json says."""
    return Tokenizer.from_file(f"{folder}/tokenizer.json").encode(text).ids


KINDS = {
    "bytes": tiny.byte_pairs(tiny.PLAIN),
    "bytes with a bos and an eos": tiny.byte_pairs(bos=True, eos=True),
    "bytes with trimmed offsets": tiny.byte_pairs(trim_offsets=True),
    "words": tiny.words(tiny.TAGGED, bos=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_become_the_tokens_of_the_file(tmp_path, family, kind):
    folder = saved(tmp_path, KINDS[kind], family)
    found = load_tokenizer(folder)
    for text in TEXTS:
        assert found(text)["input_ids"] == ids(folder, text)
    assert found.special_tokens_map == KINDS[kind].special_tokens_map
    assert found.get_vocab() == KINDS[kind].get_vocab()
    assert found.chat_template == KINDS[kind].chat_template


def test_the_library_alone_would_read_other_tokens(tmp_path):
    """What all this is for: should it ever end, so may the module."""
    folder = saved(tmp_path, KINDS["bytes"], "qwen2")
    assert isinstance(AutoTokenizer.from_pretrained(folder), Qwen2Tokenizer)
    texts = [
        text for text in TEXTS if AutoTokenizer.from_pretrained(folder)(text)["input_ids"] != ids(folder, text)
    ]
    assert texts


def test_a_model_reads_with_it(tmp_path):
    folder = tiny.save(tmp_path, "qwen2", KINDS["bytes"])
    found = load(folder, "float32").tokenizer
    assert [found(text)["input_ids"] for text in TEXTS] == [ids(folder, text) for text in TEXTS]


@pytest.mark.parametrize("kind", [LlamaTokenizer, Qwen2Tokenizer])
def test_a_tokenizer_that_is_its_file_is_the_library_s(tmp_path, kind):
    vocabulary = {
        token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "<|endoftext|>", "a", "b", "ab"])
    }
    kind(vocab=vocabulary, merges=[("a", "b")]).save_pretrained(tmp_path)
    tiny.config("llama" if kind is LlamaTokenizer else "qwen2").save_pretrained(tmp_path)
    assert type(load_tokenizer(str(tmp_path))) is type(AutoTokenizer.from_pretrained(tmp_path))


def test_special_tokens_that_a_folder_leaves_to_its_kind_of_model_are_kept(tmp_path):
    """A Qwen2 folder with nothing but tokenizer.json: the library knows which token ends a text."""
    backend = Tokenizer.from_str(KINDS["bytes"].backend_tokenizer.to_str())
    backend.add_special_tokens(["<|endoftext|>"])
    tiny.config("qwen2").save_pretrained(tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(str(tmp_path))
    assert found.eos_token == "<|endoftext|>"  # noqa: S105
    assert found.eos_token_id == backend.token_to_id("<|endoftext|>")
    assert found("the cat")["input_ids"] == backend.encode("the cat").ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bos_is_written_when_the_file_says_so(tmp_path, family):
    """Not when tokenizer_config.json does: the library goes by the file as well."""
    folder = saved(tmp_path, KINDS["bytes"], family)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    assert load_tokenizer(folder)("the cat")["input_ids"] == ids(folder, "the cat")


def test_a_folder_that_asks_for_other_tokens_than_its_file_is_refused(tmp_path):
    """The library can mend Mistral's regular expression; the file still holds the old one."""
    words = {f"w{number}": number for number in range(100_001)} | {"</s>": 100_001}
    backend = Tokenizer.from_str(KINDS["bytes"].backend_tokenizer.to_str())
    state = json.loads(backend.to_str())
    state["model"] |= {"vocab": words, "merges": []}
    state["added_tokens"] = []
    split = pre_tokenizers.Split(Regex(r"\s+"), "isolated")
    backend = Tokenizer.from_str(json.dumps(state | {"post_processor": None}))
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
    folder = saved(tmp_path, PreTrainedTokenizerFast(tokenizer_object=backend), "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"model_type": "mistral", "transformers_version": "4.50.0"})
    )
    load_tokenizer(folder)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"fix_mistral_regex": True}))
    with pytest.raises(Invalid) as refused:
        load_tokenizer(folder)
    assert (refused.value.code, refused.value.param) == ("tokenizer_differs", "model")
    assert "pre_tokenizer" in refused.value.detail
