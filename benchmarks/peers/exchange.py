"""What our process and a peer's hand each other through a folder. Needs numpy alone, so both sides import it.

``tokens.npz``, ``query_tokens.npz``
    ``ids`` int64, every example's tokens one after the other; ``offsets`` int64 (N + 1,), example i is
    ``ids[offsets[i]:offsets[i + 1]]``; ``target`` bool, as long as ``ids``: the tokens whose prediction is
    trained on. A target at position 0 of an example has nothing before it and is never counted in a loss.
``direction.npy``
    Concept direction v, float (d,). Scripts divide it by its norm.
``options.json``, ``result.json``, ``*.npy``
    What was asked, what came back. Nothing is pickled.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TOKENS, QUERY_TOKENS, DIRECTION = "tokens.npz", "query_tokens.npz", "direction.npy"
OPTIONS, RESULT = "options.json", "result.json"
IGNORED = -100  # the label that no loss counts


@dataclass(frozen=True)
class Batch:
    """Token ids and target masks of N examples, in the order of their scores."""

    ids: list[np.ndarray]
    target: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return zip(self.ids, self.target, strict=True)

    def labels(self) -> list[np.ndarray]:
        """As Hugging Face has them: the token itself where it is a target, else −100; not shifted."""
        return [np.where(target, ids, IGNORED) for ids, target in self]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


def write_tokens(path: Path, ids: Sequence[Any], target: Sequence[Any]) -> None:
    """Write examples, each a sequence of ids and a mask of the same length."""
    lengths = [len(one) for one in ids]
    if lengths != [len(one) for one in target]:
        raise ValueError("every example needs one target flag per token")
    np.savez(
        path,
        ids=np.concatenate([np.asarray(one, np.int64) for one in ids]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        target=np.concatenate([np.asarray(one, bool) for one in target]),
    )


def read_tokens(path: Path) -> Batch:
    with np.load(path) as stored:
        cuts = stored["offsets"][1:-1]
        return Batch(np.split(stored["ids"], cuts), np.split(stored["target"], cuts))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def direction(folder: Path) -> np.ndarray:
    """v̂ in float64."""
    v = np.load(folder / DIRECTION).astype(np.float64)
    return v / np.linalg.norm(v)


def asked() -> tuple[Path, dict[str, Any]]:
    """In a script: its folder (the one argument) and options, torch held to the threads that were granted."""
    import torch

    folder = Path(sys.argv[1]).resolve()
    options = read_json(folder / OPTIONS)
    torch.set_num_threads(int(options.get("threads", 1)))
    torch.manual_seed(int(options.get("seed", 0)))
    return folder, options


def block_list(model: Any) -> tuple[str, Any]:
    """The name within ``model``, and the modules, of a Hugging Face decoder's blocks."""
    prefix = model.base_model_prefix
    for name in ("layers", "h", "blocks"):
        found = getattr(model.base_model, name, None)
        if found is not None:
            return f"{prefix}.{name}", found
    raise ValueError(f"no list of blocks in {type(model).__name__}")


def linear_names(model: Any, modules: str | Sequence[str] | None = None, layer: int | None = None) -> list[str]:
    """Names, as ``model.named_modules()`` has them, of the ``nn.Linear`` to track.

    ``modules`` is a list of such names or a regular expression that a whole name must match; without it, all
    of blocks 1 … ``layer`` (all blocks when no layer is given). Never the head.
    """
    import torch

    prefix, blocks = block_list(model)
    inside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(prefix + ".")
    ]
    if isinstance(modules, str):
        chosen = [name for name in inside if re.fullmatch(modules, name)]
    elif modules is not None:
        if unknown := sorted(set(modules) - set(inside)):
            raise ValueError(f"not linear maps inside the model's blocks: {', '.join(unknown)}")
        chosen = [name for name in inside if name in set(modules)]
    else:
        last = len(blocks) if layer is None else layer
        chosen = [name for name in inside if int(name[len(prefix) + 1 :].split(".")[0]) < last]
    if not chosen:
        raise ValueError(f"no linear map matches {modules!r}")
    return chosen
