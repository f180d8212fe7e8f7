# One image for api, dispatcher, ray-head and ray-worker; docker-compose.yml gives each its command.

# 3.11 is what the tests run on. The second stage leaves pip's build tools and caches behind.
FROM python:3.11-slim AS build

# "server,cpu" or "server,gpu", never both: the two FAISS builds overwrite each other.
ARG EXTRAS=server,cpu
# Handed to pip: a mirror, or an index of CPU builds of torch, which are gigabytes smaller than the default.
ARG PIP_ARGS=

RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build

# Dependencies before code: a change of code leaves this layer, which is most of the image, as it is.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir ${PIP_ARGS} -c constraints.txt ".[${EXTRAS}]"

COPY api ./api
COPY service ./service
COPY workers ./workers
RUN pip install --no-cache-dir ${PIP_ARGS} --no-deps --force-reinstall .


FROM python:3.11-slim

# A fixed uid: files in a volume that several hosts share belong to the same user on all of them.
# A named volume takes the owner of the folder it is mounted on, so both folders exist in the image:
# /var/lib/whence for storage, ~/.ray for the token that Ray nodes show each other.
RUN useradd --uid 10001 --create-home whence \
 && install -d -o whence -g whence /var/lib/whence /home/whence/.ray

COPY --from=build /opt/venv /opt/venv

# OMP_WAIT_POLICY: FAISS's threads must not spin between queries. HF_HUB_OFFLINE: models are folders here.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/whence \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    HF_HUB_OFFLINE=1 \
    RAY_USAGE_STATS_ENABLED=0

USER whence
WORKDIR /home/whence
EXPOSE 8311
CMD ["python", "-m", "api.main"]
