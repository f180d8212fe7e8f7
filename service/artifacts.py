"""What passes need first, at rest: eigenvectors, λ, Jacobians, heads, query coordinates.

An artifact is a folder of safetensors files, named by the hash of everything that decides it; it exists
when its manifest does, and is never written again.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from service import results
from service.errors import Damaged, NotFound
from service.storage import Storage, sha256_bytes
from service.tasks import Artifact

Tensors = Mapping[str, NDArray[Any]]
MANIFEST = "artifact.json"


def publish(
    storage: Storage,
    key: str,
    tensors: Mapping[str, Tensors],
    *,
    facts: Mapping[str, float | int | str] | None = None,
    versions: Mapping[str, str] | None = None,
    answer: bool = False,
    by_content: bool = False,
) -> Artifact:
    """Store each entry of ``tensors`` (file stem → named arrays) and then the manifest.

    ``answer``: nothing is computed from it, so a damaged one may be replaced by whatever is computed now.
    ``by_content``: the key is a hash of the tensors, so a damaged one may be replaced by what has it. Others by
    their like alone, or Damaged (``cannot_repair_exactly``) is raised.
    """
    files = {
        f"{stem}.safetensors": save_safetensors({name: np.ascontiguousarray(v) for name, v in arrays.items()})
        for stem, arrays in tensors.items()
    }
    hashes = {name: sha256_bytes(data) for name, data in files.items()}
    artifact = Artifact(key, dict(facts or {}), hashes, dict(versions or {}))
    free = answer or by_content  # also where a mark, which cannot tell what it stands on, asks for the like
    return results.publish(storage, folder(key), MANIFEST, artifact, files, named=answer, by_content=free)


def find(storage: Storage, key: str) -> Artifact | None:
    """The artifact's manifest, or None while it does not exist. Raises Damaged."""
    name = f"{folder(key)}/{MANIFEST}"
    if not storage.exists(name):
        return None
    artifact = results.read_sealed(storage, name, Artifact)
    if artifact.key != key:
        raise Damaged("damaged_file", f"{name} is the manifest of another artifact.", param=name)
    return artifact


def made(storage: Storage, key: str) -> Artifact | None:
    """The manifest for those who make what is missing: None as well when it cannot be read, or is marked."""
    artifact = results.made(storage, folder(key), MANIFEST, Artifact)
    return artifact if artifact is not None and artifact.key == key else None


def find_answer(storage: Storage, key: str, stem: str) -> tuple[Artifact, dict[str, NDArray[Any]]] | None:
    """An artifact and one of its files, or None when it is missing or damaged: what can simply be asked again."""
    try:
        artifact = find(storage, key)
        return None if artifact is None else (artifact, read(storage, artifact, stem))
    except (Damaged, NotFound):
        return None


def get(storage: Storage, key: str) -> Artifact:
    """Like ``find``; Damaged when it is not there although something refers to it."""
    artifact = find(storage, key)
    if artifact is None:
        name = f"{folder(key)}/{MANIFEST}"
        raise Damaged("missing_artifact", f"Storage has no artifact {key}.", param=name)
    return artifact


def stems(artifact: Artifact) -> list[str]:
    """The names under which ``read`` finds tensors, in the order they were stored."""
    return [name.removesuffix(".safetensors") for name in artifact.files]


def read(storage: Storage, artifact: Artifact, stem: str) -> dict[str, NDArray[Any]]:
    """The named arrays of one file, checked against its sha256. Raises Damaged."""
    name = f"{stem}.safetensors"
    return load_safetensors(storage.read(f"{folder(artifact.key)}/{name}", sha256=artifact.files[name]))


def remove(storage: Storage, key: str) -> None:
    """Delete an artifact that nothing refers to any more: its manifest first, so that nobody meets half of it."""
    artifact = made(storage, key)
    storage.remove(f"{folder(key)}/{MANIFEST}")
    for name in artifact.files if artifact is not None else ():
        storage.remove(f"{folder(key)}/{name}")


def folder(key: str) -> str:
    return f"artifacts/{key[:2]}/{key}"
