# flowlm in a container; the arguments after the image's name are those of the command `flowlm`.
#   docker build --build-arg EXTRAS=cuda --build-arg COMMIT=$(git rev-parse HEAD) -t flowlm .
#   docker run --gpus=all -v /data:/data flowlm train --config=experiments/quickstart.py --workdir=/data/run --config.data.dir=/data
# The chips of a TPU machine are root's: build there with `--target=root --build-arg EXTRAS=tpu,gcp`, run with `--privileged --net=host`.
# What is built on: a tag names another image every few weeks, a digest always the same. `requirements/base.sh` prints today's.
ARG BASE=python:3.11-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7
FROM ${BASE} AS root
WORKDIR /flowlm
# In layers of their own and before the code, because they change less often and are large; the first is that of all images.
COPY requirements requirements
RUN pip install --no-cache-dir --requirement requirements/core.txt
# What to install beside the core, of which requirements/ has a lock file: cuda, gcp, cuda,gcp, tpu,gcp, or nothing.
ARG EXTRAS=
RUN pip install --no-cache-dir --requirement "requirements/$(echo "${EXTRAS:-core}" | tr , +).txt"
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .
# For the versions.json of runs, because the repository itself is left out.
ARG COMMIT=unknown
ENV FLOWLM_COMMIT=$COMMIT
ARG BASE
LABEL org.opencontainers.image.base.name=$BASE org.opencontainers.image.revision=$COMMIT
ENTRYPOINT ["flowlm"]

FROM root
RUN useradd --create-home flowlm && chown flowlm:flowlm /flowlm
USER flowlm
