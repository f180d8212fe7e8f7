"""Object stores through fsspec: how they are opened, and what their errors mean to people.

A driver (s3fs …) is imported when a root asks for it. It finds credentials and endpoint as it does in every other
program; for S3 that is AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and the rest of botocore's chain.
"""

import errno
import re
from typing import Any
from urllib.parse import urlsplit

import fsspec

from service.errors import DomainError, Invalid, NotFound, Unavailable

LOCAL = ("file", "local")
_S3 = ("s3", "s3a")
# botocore repeats what never got an answer and what the store calls transient, with growing random pauses; s3fs
# repeats what broke off in mid-body. Both together: a store that is down is told after seconds, one that accepts
# connections and says nothing after 2 × 2 × 3 × 15 s.
_S3_CONFIG = {
    "retries": {"mode": "standard", "total_max_attempts": 3},
    "connect_timeout": 5,
    "read_timeout": 15,
    "max_pool_connections": 32,  # the api reads from many threads
}
_S3_ATTEMPTS = 2
_BUCKET = re.compile("[A-Za-z0-9._-]{1,255}|arn:.+")
# What the store or its driver calls it → what we say of it.
_NO_BUCKET = re.compile("NoSuchBucket|InvalidBucketName")
_NO_CREDENTIALS = re.compile(
    "(NoCredentials|PartialCredentials|CredentialRetrieval|NoAuthToken|TokenRetrieval|.*SSO.*)Error|ProfileNotFound"
)
_FORBIDDEN = re.compile(
    "403|AccessDenied|Forbidden|AccountProblem|AllAccessDisabled|InvalidAccessKeyId|SignatureDoesNotMatch|"
    "Expired.*|InvalidToken|RequestTimeTooSkewed|NotSignedUp|UnauthorizedAccess"
)
_ELSEWHERE = re.compile("301|307|PermanentRedirect|TemporaryRedirect|AuthorizationHeaderMalformed")


def connect(root: str) -> tuple[Any, str, bool]:
    """(filesystem, path of the root in it, whether it is a local disk). Nothing is sent yet.

    Raises Invalid for an address nobody can use, Unavailable when its driver is not installed.
    """
    protocol = root.split("://", 1)[0] if "://" in root else "file"
    options: dict[str, Any] = {}
    if protocol not in LOCAL:
        # What others publish must be seen at once; and a cached instance would keep old credentials.
        options = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in _S3:
        # One request for a read, whatever the size: it sees one version of the object and needs no HEAD before.
        options |= {"max_concurrency": 1, "config_kwargs": _S3_CONFIG}
    try:
        filesystem, base = fsspec.core.url_to_fs(root, **options)
    except ImportError as error:
        extra = "whence[s3]" if protocol in _S3 else "its fsspec driver"
        raise Unavailable(
            "storage_driver_missing",
            f"Storage {shown(root)} needs a package that is not installed ({error}). Install {extra} where the "
            "api, the dispatcher and the Ray workers run.",
            param="WHENCE_STORAGE_URL",
        ) from error
    except ValueError as error:
        raise _bad_root(root, str(error)) from error
    protocols = (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
    if protocol in _S3:
        filesystem.retries = _S3_ATTEMPTS
        if not _BUCKET.fullmatch(base.split("/", 1)[0]):
            raise _bad_root(root, "it does not begin with the name of a bucket")
    return filesystem, base, any(name in LOCAL for name in protocols)


def _bad_root(root: str, why: str) -> Invalid:
    return Invalid(
        "bad_storage_url",
        f"{shown(root)!r} is no storage address: {why}. Give a folder or an fsspec URL such as s3://bucket/prefix.",
        param="WHENCE_STORAGE_URL",
    )


def shown(address: str) -> str:
    """An address without user, password and query, which may be secrets."""
    return re.sub(r"//[^/@]*@", "//", address).split("?", 1)[0]


def explain(error: Exception, root: str, key: str) -> DomainError | None:
    """What an exception of a filesystem means; None for one that is a bug of ours.

    The sentences hold names and codes of the store only, never its messages, which may quote what was sent.
    """
    chain = _chain(error)
    code = _code(chain)
    if isinstance(error, FileNotFoundError) and not (code and _NO_BUCKET.fullmatch(code)):
        return NotFound("file_not_found", f"Storage has no {key}.", param=key)
    if getattr(error, "errno", None) == errno.ENAMETOOLONG:
        return Invalid("bad_storage_key", f"{key[:100]!r}… is longer than the storage takes.")
    if type(error).__module__ == "builtins" and not isinstance(error, OSError | ValueError | EOFError):
        return None
    names = [code] if code else [type(each).__name__ for each in chain]
    problem, sentence = _outage(names, isinstance(error, PermissionError), root)
    return Unavailable(problem, f"Storage {shown(root)}{_at(chain)} {sentence}")


def _outage(names: list[str], refused: bool, root: str) -> tuple[str, str]:
    """(code, the rest of a sentence that begins with the storage) for errors called ``names``, outermost first."""
    name, s3 = names[0], urlsplit(root).scheme in _S3
    who = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, or the machine's role)"
    if any(map(_NO_BUCKET.fullmatch, names)):
        return (
            "storage_bucket_missing",
            f"has no such bucket ({name}). Create it, or name another one in WHENCE_STORAGE_URL; AWS_ENDPOINT_URL "
            "says whose buckets are meant.",
        )
    if any(map(_NO_CREDENTIALS.fullmatch, names)):
        return (
            "storage_no_credentials",
            f"needs credentials and there are none ({name}). Set {who if s3 else 'those of its driver'} for the "
            "api, the dispatcher and every Ray node.",
        )
    if refused or any(map(_FORBIDDEN.fullmatch, names)):
        return (
            "storage_forbidden",
            f"refuses what was asked for ({name}). {who if s3 else 'The credentials of its driver'} must be those "
            "of somebody who may list, read, write and delete there"
            + (", and AWS_ENDPOINT_URL must name their store." if s3 else "."),
        )
    if any(map(_ELSEWHERE.fullmatch, names)):
        return "storage_elsewhere", f"lies in another region than the one asked ({name}). Set AWS_DEFAULT_REGION."
    return (
        "storage_unavailable",
        f"does not answer as it should ({name}). Check that it runs and that this machine reaches it"
        + (" (AWS_ENDPOINT_URL, as http://host:port, says where it is)" if s3 else "")
        + "; the same call works again once it does.",
    )


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was made from."""
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__  # not __context__: that may be what a caller of ours is dealing with
    return found


def _code(chain: list[BaseException]) -> str | None:
    """The store's own word for it, such as NoSuchBucket."""
    for each in chain:
        response = getattr(each, "response", None)
        if isinstance(response, dict) and (code := response.get("Error", {}).get("Code")):
            return re.sub(r"[^A-Za-z0-9._-]", "", str(code))[:60]
    return None


def _at(chain: list[BaseException]) -> str:
    """`` at http://host:port`` where an error tells whom it asked."""
    for each in chain:
        url = getattr(each, "kwargs", {}).get("endpoint_url")
        if isinstance(url, str):
            parts = urlsplit(url)
            return f" at {parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return ""
