"""Calls a script in a peer's environment, from ours.

    if available("bergson"):
        with tempfile.TemporaryDirectory() as folder:
            prepare(folder, model, ids, target, query_ids=..., query_target=..., direction=v)
            result = call("bergson", "bergson_scores", folder, layer=2)

Where a peer is not installed, ``missing`` says so and benchmarks go on without it.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import exchange

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".peers"
PEERS = ("bergson", "kronfluence")
LOG = "log.txt"  # everything the script printed
MODEL = "model"


class PeerMissing(RuntimeError):
    """The peer's environment has not been made."""


class PeerFailed(RuntimeError):
    """The script ended with an error; the message ends with what it printed last."""


def python(peer: str) -> Path:
    if peer not in PEERS:
        raise ValueError(f"no such peer: {peer} (there are {', '.join(PEERS)})")
    return HOME / peer / "bin" / "python"


def available(peer: str) -> bool:
    """Was ``make peers`` run to its end for this peer?"""
    return python(peer).exists() and (HOME / peer / ".done").exists()


def missing(peer: str) -> str:
    """What to tell a user when it was not."""
    return f"{peer} is not installed, so nothing is compared with it: run `make peers`"


def prepare(
    folder: Path | str,
    model: Path | str,
    ids: Sequence[Any],
    target: Sequence[Any],
    *,
    query_ids: Sequence[Any] | None = None,
    query_target: Sequence[Any] | None = None,
    direction: np.ndarray | None = None,
) -> Path:
    """Lay out what the scripts read. ``model`` is a Hugging Face folder; it is linked, not copied."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / MODEL
    if link.is_symlink():
        link.unlink()
    if Path(model).resolve() != link.resolve():
        link.symlink_to(Path(model).resolve(), target_is_directory=True)
    exchange.write_tokens(folder / exchange.TOKENS, ids, target)
    if query_ids is not None and query_target is not None:
        exchange.write_tokens(folder / exchange.QUERY_TOKENS, query_ids, query_target)
    if direction is not None:
        np.save(folder / exchange.DIRECTION, np.asarray(direction, np.float64))
    return folder


def call(
    peer: str, script: str, folder: Path | str, *, threads: int = 1, timeout: float | None = None, **options: Any
) -> dict[str, Any]:
    """Run ``benchmarks.peers.<script>`` on ``folder`` in the peer's environment; what it wrote to result.json."""
    folder = Path(folder)
    arguments, environment = _start(peer, script, folder, threads, options)
    with (folder / LOG).open("w") as log:
        try:
            ended = subprocess.run(
                arguments,
                check=False,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise PeerFailed(f"{script} took more than {timeout} s") from error
    if ended.returncode:
        raise _failure(script, folder)
    return exchange.read_json(folder / exchange.RESULT)


@contextmanager
def rounds(
    peer: str, script: str, folder: Path | str, *, threads: int = 1, **options: Any
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Keep a script alive that does one round per line read; yields the call that asks for one round.

    Between rounds it waits idle, so that a caller can take turns with rounds of its own:

        with rounds("bergson", "bergson_collect", folder) as theirs:
            theirs()  # warms up
            times = [(ours(), theirs()["seconds"]) for _ in range(5)]
    """
    folder = Path(folder)
    arguments, environment = _start(peer, script, folder, threads, options)
    with (folder / LOG).open("w") as log:
        process = subprocess.Popen(
            arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        source, sink = process.stdout, process.stdin

        def answer() -> dict[str, Any]:
            line = source.readline()
            if not line:
                process.wait()
                raise _failure(script, folder)
            return json.loads(line)

        def one() -> dict[str, Any]:
            try:
                sink.write("round\n")
                sink.flush()
            except BrokenPipeError:
                raise _failure(script, folder) from None
            return answer()

        try:
            answer()  # it says when everything is loaded
            yield one
        finally:
            with suppress(BrokenPipeError):  # it ended before: the failure is on its way already
                sink.close()  # the end of its input ends the script
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            source.close()


def _start(
    peer: str, script: str, folder: Path, threads: int, options: Mapping[str, Any]
) -> tuple[list[str], dict[str, str]]:
    if not available(peer):
        raise PeerMissing(missing(peer))
    exchange.write_json(folder / exchange.OPTIONS, {"threads": threads, **options})
    (folder / exchange.RESULT).unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    return [str(python(peer)), "-m", f"benchmarks.peers.{script}", str(folder)], environment


def _failure(script: str, folder: Path) -> PeerFailed:
    tail = (folder / LOG).read_text().strip().splitlines()[-12:]
    return PeerFailed("\n".join([f"{script} failed; the end of {folder / LOG}:", *tail]))
