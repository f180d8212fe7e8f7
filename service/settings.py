"""The only reader of environment variables: every setting, its default and why.

Each field is read from ``WHENCE_<NAME>`` (``REDIS_URL`` is accepted as well for the Redis address).
"""

import os
import re
from functools import cached_property
from pathlib import Path

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import Forbidden, Invalid
from service.local_cache import CacheAt

# No user, query or fragment: what is called is this and a path behind it.
_JUDGE = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+(/[A-Za-z0-9._~/\-]*)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="WHENCE_", populate_by_name=True, extra="ignore")

    home: Path = Field(Path(".whence"), description="Folder of the one-machine stack: data, logs, Redis.")
    storage_url: str = Field(
        "",
        description="Where models, datasets, indexes live: a folder or an fsspec URL. Default: HOME/storage.",
    )
    cache_bytes: int = Field(
        8 << 30,
        ge=0,
        description="Disk for files of a remote storage, in HOME/cache of every machine that reads them; 0: none.",
    )
    redis_url: SecretStr = Field(
        SecretStr(""),
        validation_alias=AliasChoices("WHENCE_REDIS_URL", "REDIS_URL"),
        description="Redis address. Default of `whence up`: an embedded server on a private unix socket.",
    )
    roots: str = Field(
        "",
        description=f"Folders a path in a request may point into, joined by '{os.pathsep}'. Default: none.",
    )
    host: str = Field("127.0.0.1", description="Address the api listens on.")
    port: int = Field(8311, ge=0, le=65535, description="Port the api listens on.")
    max_upload_bytes: int = Field(1 << 30, ge=1, description="Largest dataset accepted, uncompressed.")
    max_line_bytes: int = Field(32 << 20, ge=1, description="Longest line of a dataset accepted.")

    ray_address: str = Field(
        "", description="Ray cluster to join ('auto' or host:port). Default: the dispatcher starts its own."
    )
    workers: int = Field(0, ge=0, description="Ray actors. Default: one per GPU, else one per CPU core, at most 8.")
    worker_threads: int = Field(1, ge=1, description="torch threads per worker.")
    worker_cpus: float = Field(1.0, gt=0, allow_inf_nan=False, description="CPUs that Ray reserves for a worker.")
    gpus_per_worker: int = Field(
        1, ge=1, description="GPUs of a worker, where there are any; a model is spread over them block by block."
    )
    shard_size: int = Field(256, ge=1, description="Examples per shard: the unit of retry, resume and progress.")
    token_budget: int = Field(8192, ge=16, description="Padded tokens per batch; more is faster until memory ends.")
    dtype: str = Field(
        "float32", pattern="^(float32|bfloat16|float16)$", description="Precision models are loaded in."
    )

    lease_s: float = Field(
        15.0,
        gt=0.3,
        allow_inf_nan=False,
        description="A job whose dispatcher is silent for this long is taken over.",
    )
    max_attempts: int = Field(5, ge=1, description="Claims after which a job that kills its dispatcher is failed.")
    shard_attempts: int = Field(3, ge=1, description="Workers that may die on one shard before the job fails.")
    search_threads: int = Field(
        default_factory=lambda: min(8, os.cpu_count() or 1), ge=1, description="Threads of one FAISS search."
    )
    search_bytes: int = Field(
        default_factory=lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2,
        ge=1 << 20,
        description="Memory of the api for the rows that queries search. Default: half of the machine's.",
    )
    head_bytes: int = Field(
        1 << 30,
        ge=1 << 10,
        description="Memory of one influence head (r × K float32): decides how many coordinates K it uses.",
    )
    curvature_bytes: int = Field(
        4 << 30,
        ge=1 << 10,
        description="Memory of the EK-FAC factors in a worker; modules beyond it take another pass of the sample.",
    )
    max_k: int = Field(10_000, ge=1, description="Most hits one query may ask for.")

    judges: str = Field(
        "",
        description="OpenAI-compatible endpoints that may judge answers: base URLs joined by commas, each with "
        "=VARIABLE behind it where the dispatcher's environment has a key for it. Default: none.",
    )
    judge_parallel: int = Field(8, ge=1, le=256, description="Questions a judge is asked at a time.")

    @field_validator("judges")
    @classmethod
    def _are_judges(cls, value: str) -> str:
        for part in filter(None, value.split(",")):
            url, _, variable = part.strip().partition("=")
            if not (_JUDGE.fullmatch(url) and (not variable or _VARIABLE.fullmatch(variable))):
                raise ValueError(
                    "expected http(s)://HOST[:PORT][/PATH] or the same with =VARIABLE, joined by commas"
                )
        return value

    @cached_property
    def judge_urls(self) -> dict[str, str]:
        """Base URLs of judges, each with the name of the variable that holds its key, or with ""."""
        parts = (part.strip().partition("=") for part in self.judges.split(",") if part.strip())
        return {url.rstrip("/"): variable for url, _, variable in parts}

    def judge_at(self, url: str | None) -> str:
        """The base URL of a judge, if it is one of them; None: the only one. Raises Forbidden, Invalid.

        Whole base URLs are compared, so that no request can point the server, or a key, at another address.
        """
        known = self.judge_urls
        if url is None and len(known) != 1:
            which = (
                f"Name one of {', '.join(known)}." if known else "None is allowed: set WHENCE_JUDGES on the server."
            )
            raise Invalid("judge_url_needed", f"Which judge? {which}", param="judge.url")
        found = next(iter(known)) if url is None else url.rstrip("/")
        if found not in known:
            raise Forbidden(
                "judge_not_allowed",
                f"This server may not call {url}; it may call {', '.join(known) or 'no judge'}. Whoever runs it "
                "adds base URLs to WHENCE_JUDGES.",
                param="judge.url",
            )
        return found

    def judge_key(self, url: str) -> SecretStr | None:
        """The key of a judge; None: it needs none. Raises Invalid while its variable is not set."""
        variable = self.judge_urls[url]
        if not variable:
            return None
        key = os.environ.get(variable, "").strip()
        if not (key and key.isascii() and key.isprintable()):  # else it would be shown by whoever cannot send it
            raise Invalid(
                "judge_key_missing",
                f"The dispatcher has no usable {variable} in its environment, where WHENCE_JUDGES says that the "
                f"key of {url} is. Set it and start the dispatcher again.",
                param="judge.url",
            )
        return SecretStr(key)

    @cached_property
    def storage_root(self) -> str:
        """The storage address as fsspec understands it."""
        return self.storage_url or str((self.home.expanduser() / "storage").absolute())

    @cached_property
    def cache(self) -> CacheAt:
        """Where files of a remote storage are kept on this machine."""
        return CacheAt((self.home.expanduser() / "cache").absolute(), self.cache_bytes)

    @cached_property
    def allowed_roots(self) -> tuple[Path, ...]:
        """Folders that paths in requests may point into, symbolic links resolved."""
        return tuple(Path(part).expanduser().resolve() for part in self.roots.split(os.pathsep) if part)


def load_settings() -> Settings:
    """Settings from the environment. Raises Invalid naming the variables that are off."""
    try:
        return Settings()  # pyright: ignore[reportCallIssue]  (fields come from the environment)
    except ValidationError as error:
        wrong = [
            f"WHENCE_{str(item['loc'][0]).upper().removeprefix('WHENCE_')}: {item['msg']}"
            for item in error.errors()
        ]
        raise Invalid("bad_settings", f"{'; '.join(wrong)}.") from error
