"""Makes the stored truth beside it, with kronfluence 1.0.1 (``make peers``, then from the repository's root):

    PYTHONPATH=. .peers/kronfluence/bin/python tests/data/kronfluence/make.py

Everything is seeded; the same versions give the same numbers.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers import exchange
from benchmarks.peers.kronfluence_scores import score

HERE = Path(__file__).parent
EXAMPLES, QUERIES, LAYER, VOCAB, WIDTH = 24, 4, 2, 96, 16
OPTIONS = {
    "labels": "true",
    "factor_positions": "all",
    "dtype": "float64",
    "layer": 3,  # modules of all three blocks; the concept lives at LAYER
    "absolute": [0.1, 10.0],
    "relative": [0.1, 1.0],
    "dump": True,
    "batch": 5,
    "query_batch": 3,
}


def model() -> LlamaForCausalLM:
    """As tests/tiny.py: three blocks without biases, grouped heads, noise large enough for every path to matter."""
    torch.manual_seed(11)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=None,
        )
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
    return made.eval()


def examples(count: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random ids from 2 up, 8 to 31 of them; a prompt of a third, then targets with a gap of one in between."""
    generator = np.random.default_rng(seed)
    ids, target = [], []
    for _ in range(count):
        length = int(generator.integers(8, 32))
        mask = np.arange(length) >= length // 3
        mask[length // 2] = False
        ids.append(generator.integers(2, VOCAB, size=length))
        target.append(mask)
    return ids, target


def main() -> None:
    torch.set_num_threads(1)
    model().save_pretrained(HERE / "model")
    exchange.write_tokens(HERE / exchange.TOKENS, *examples(EXAMPLES, 1))
    exchange.write_tokens(HERE / exchange.QUERY_TOKENS, *examples(QUERIES, 2))
    np.save(HERE / exchange.DIRECTION, np.random.default_rng(3).normal(size=WIDTH))

    result = score(HERE, {**OPTIONS, "queries": ["loss"]})
    concept = score(HERE, {**OPTIONS, "queries": ["concept"], "layer": LAYER, "modules": ".*"})
    assert concept["modules"] == result["modules"]
    del result["seconds"]
    exchange.write_json(HERE / exchange.RESULT, {**result, "kinds": ["loss", "concept"], "concept_layer": LAYER})
    for one in HERE.rglob("*.safetensors"):
        one.chmod(0o644)


if __name__ == "__main__":
    main()
