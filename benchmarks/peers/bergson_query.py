# pyright: reportMissingImports=false
"""Times searches with bergson 2.5.1 over given vectors, a query per round: its dense scoring and its FAISS "Flat".

The folder holds ``vectors.npy`` (n, d) and ``queries.npy`` (q, d), float32. The vectors are handed to bergson as a
store of one module, so that nothing is projected, normalised or preconditioned. Says ``{"ready": true, ...}`` once
both are loaded; then, for every line read, answers ``dense_s`` and ``flat_s`` of the next query and the rows found.
Options: ``k`` (100), ``threads``. bergson's FAISS path asks for ``faiss.GpuIndex``, which faiss-cpu lacks: an empty
type will do.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import exchange

MODULE = "all"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    folder, options = exchange.asked()
    import faiss
    import torch
    from bergson.config import FaissConfig
    from bergson.gradients import GradientProcessor
    from bergson.query.attributor import Attributor

    threads, k = int(options.get("threads", 1)), int(options.get("k", 100))
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    if not hasattr(faiss, "GpuIndex"):
        faiss.GpuIndex = type("GpuIndex", (), {})
    store = _store(folder)
    GradientProcessor().save(store)
    dense = Attributor(store)
    flat = Attributor(store, faiss_cfg=FaissConfig("Flat"))
    queries = torch.from_numpy(np.load(folder / "queries.npy"))

    def timed(attributor: Attributor, query: torch.Tensor) -> tuple[float, list[int]]:
        began = time.perf_counter()
        _, rows = attributor.search({MODULE: query}, k)
        return time.perf_counter() - began, rows[0].tolist()

    answer({"ready": True, "vectors": len(np.load(folder / "vectors.npy", mmap_mode="r"))})
    for number, _ in enumerate(sys.stdin):
        query = queries[number % len(queries)][None]
        (dense_s, dense_rows), (flat_s, flat_rows) = timed(dense, query), timed(flat, query)
        answer({"dense_s": dense_s, "flat_s": flat_s, "dense_rows": dense_rows, "flat_rows": flat_rows})


def _store(folder: Path) -> Path:
    """The vectors as bergson lays out gradients."""
    store = folder / "store"
    store.mkdir(exist_ok=True)
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    with (store / "gradients.bin").open("wb") as file:
        for start in range(0, len(vectors), 8192):
            file.write(np.ascontiguousarray(vectors[start : start + 8192], dtype=np.float32).tobytes())
    info = {"num_grads": len(vectors), "grad_sizes": {MODULE: vectors.shape[1]}, "base_dtype": "float32"}
    (store / "info.json").write_text(json.dumps(info))
    return store


if __name__ == "__main__":
    main()
