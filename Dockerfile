# docker build -t srwm-rl .                                       for the CPU
# docker build -t srwm-rl:cuda --build-arg DEVICE=cuda .          for NVIDIA GPUs
# docker run --rm -v "$PWD/logs:/work/logs" srwm-rl train --env hidden_controls -n 600000
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG DEVICE=cpu
ARG EXTRAS=
# The C compiler builds the CPU kernels; it stays in this stage.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
WORKDIR /src
COPY constraints.txt ./
# PyPI's torch is the one with CUDA. What torch needs comes with the package below, from PyPI either way.
RUN case "${DEVICE}" in \
      cpu) index=https://download.pytorch.org/whl/cpu ;; \
      cuda) index=https://pypi.org/simple ;; \
      *) echo "DEVICE is cpu or cuda, not ${DEVICE}"; exit 1 ;; \
    esac \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps --index-url "${index}" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY srwm_rl srwm_rl
COPY agents agents
COPY envs envs
COPY scripts scripts
RUN /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt ".${EXTRAS:+[${EXTRAS}]}"

FROM python:${PYTHON}-slim-bookworm
ARG DEVICE=cpu
LABEL org.opencontainers.image.title="srwm-rl" org.opencontainers.image.licenses="MIT"
# ProcGen links against OpenGL and GLib; on a GPU Triton compiles its launchers with gcc.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
    && if [ "${DEVICE}" = cuda ]; then apt-get install --yes --no-install-recommends gcc libc6-dev; fi \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home srwm && install --directory --owner srwm /work /work/logs
COPY --from=build /opt/venv /opt/venv
# Caches go where any user may write, for docker run --user.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    XDG_CACHE_HOME=/tmp/cache
USER 1000
WORKDIR /work
ENTRYPOINT ["srwm-rl"]
CMD ["--help"]
