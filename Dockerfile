# flowlm in a container; the arguments after the image's name are those of the command `flowlm`.
#   docker build --build-arg EXTRAS=cuda -t flowlm .
#   docker run --gpus=all -v /data:/data flowlm train --config=experiments/quickstart.py --workdir=/data/run --config.data.dir=/data
FROM python:3.11-slim
# What to install beside the core: tpu, cuda, gcp, judge, hf, several behind commas, or nothing.
ARG EXTRAS=
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home flowlm && install --directory --owner=flowlm --group=flowlm /home/flowlm/flowlm
USER flowlm
WORKDIR /home/flowlm/flowlm
COPY --chown=flowlm:flowlm . .
RUN bash launch/setup.sh "$EXTRAS"
ENV PATH=/home/flowlm/flowlm/.venv/bin:$PATH
ENTRYPOINT ["flowlm"]
