"""The tokenizer of a folder, as its tokenizer.json says: what the model was trained with."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from service.errors import Invalid

_FILE = "tokenizer.json"


def load(folder: str) -> PreTrainedTokenizerFast:
    """Raises Invalid when there is no tokenizer.json, or the library reads texts differently from it.

    For some kinds of models the library builds the tokenizer anew from the vocabulary, with a pre-tokenizer of its
    own (Qwen2Tokenizer): then the file is loaded as it stands, with the special tokens and template of the folder.
    """
    about: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    found: Any = AutoTokenizer.from_pretrained(folder, **about)
    if not (found.is_fast and (Path(folder) / _FILE).is_file()):
        raise Invalid("no_tokenizer", f"{folder} has no fast tokenizer ({_FILE}).", param="model")
    if not _differences(found, folder):
        return found
    plain: Any = PreTrainedTokenizerFast.from_pretrained(folder, **about)
    if differ := _differences(plain, folder):
        raise Invalid(
            "tokenizer_differs",
            f"{folder} is read with another {' and '.join(differ)} than its {_FILE} says. Load it and save it "
            f"again with transformers, so that {_FILE} holds what its other files ask for.",
            param="model",
        )
    vocabulary = plain.get_vocab()
    for name, token in found.special_tokens_map.items():  # those that the folder leaves to the kind of model
        if isinstance(token, str) and token in vocabulary and getattr(plain, name, None) is None:
            setattr(plain, name, token)
    return plain


def _differences(tokenizer: Any, folder: str) -> list[str]:
    """The parts that decide the tokens of a text, as far as they are not those of the file."""
    file, ours = _parts(Tokenizer.from_file(str(Path(folder) / _FILE))), _parts(tokenizer.backend_tokenizer)
    return [part for part, said in file.items() if ours[part] != said]


def _parts(backend: Tokenizer) -> dict[str, Any]:
    said = json.loads(backend.to_str())
    after = said["post_processor"]
    if after is not None and after["type"] == "TemplateProcessing" and not after["special_tokens"]:
        said["post_processor"] = None  # it adds nothing: the library writes one where a file has none
    return {part: said[part] for part in ("model", "normalizer", "pre_tokenizer", "post_processor")}
