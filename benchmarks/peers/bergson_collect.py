# pyright: reportMissingImports=false
"""Times bergson 2.5.1's ``collect_gradients``, one round per line on its input (see ``run.rounds``).

Says ``{"ready": true, ...}`` once the model is loaded, then for every line read does one round, into a new store
in a temporary folder, and answers one JSON line: ``seconds`` (the call alone), ``bytes_per_example``, ``tokens``.
It ends with its input. The first round also makes the projection matrices: let it warm up.

Options: ``modules``, ``layer``, ``projection_dim`` (16), ``token_batch_size`` (2048), ``dtype`` float32 | bfloat16,
``loss_reduction``, ``threads``. Whatever bergson prints goes to the error output, so that answers stay whole.
"""

import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import exchange


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    folder, options = exchange.asked()
    from bergson.collection import collect_gradients
    from bergson.data import allocate_batches
    from bergson.utils.worker_utils import processor_for, setup_model_and_peft

    from benchmarks.peers.bergson_common import dataset, index_config, targets

    tokens = exchange.read_tokens(folder / exchange.TOKENS)
    data = dataset(tokens)
    cfg = index_config(folder, Path("unused"), options)
    model, _ = setup_model_and_peft(cfg)
    modules = targets(model, options)
    processor = processor_for(cfg)
    batches = allocate_batches(data["length"][:], cfg.token_batch_size)
    answer({"ready": True, "modules": len(modules), "batches": len(batches), "tokens": tokens.tokens})

    for _ in sys.stdin:
        with tempfile.TemporaryDirectory() as work:
            cfg = index_config(folder, Path(work) / "store", options)
            cfg.partial_run_path.mkdir(parents=True)
            gc.collect()
            began = time.perf_counter()
            collect_gradients(model, data, processor, cfg, batches=batches, target_modules=modules)
            seconds = time.perf_counter() - began
            size = (cfg.partial_run_path / "gradients.bin").stat().st_size
        answer({"seconds": seconds, "bytes_per_example": size / len(tokens), "tokens": tokens.tokens})


if __name__ == "__main__":
    main()
