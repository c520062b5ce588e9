# Two images: `--target coord` is the coordinator, `--target basher` the worker.

FROM debian:bookworm-slim AS python
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/bfaas/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# Everything that Python needs, with bytecode, since a worker starts for every run.
FROM python AS built
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/bfaas
COPY requirements.lock /src/
RUN pip install --no-cache-dir --no-compile --disable-pip-version-check -r /src/requirements.lock
COPY pyproject.toml README.md LICENSE /src/
COPY bfaas /src/bfaas
COPY twisted /src/twisted
# twistd caches the plugins that it finds here; at run time it may not write the cache.
RUN pip install --no-cache-dir --no-compile --disable-pip-version-check --no-deps /src \
    && pip uninstall -y --quiet pip setuptools \
    && python -m compileall -q -j 0 /opt/bfaas/lib \
    && twistd --help > /dev/null

# The worker uses no TLS and sends no requests.
FROM built AS worker
RUN rm -r /opt/bfaas/lib/python3.11/site-packages/OpenSSL \
        /opt/bfaas/lib/python3.11/site-packages/service_identity \
        /opt/bfaas/lib/python3.11/site-packages/prometheus_client \
        /opt/bfaas/lib/python3.11/site-packages/treq

FROM python AS coord
RUN useradd --system --no-create-home --shell /usr/sbin/nologin coord
COPY --from=built /opt/bfaas /opt/bfaas
USER coord
EXPOSE 8000 9091
STOPSIGNAL SIGTERM
ENTRYPOINT ["twistd", "-n", "--pidfile=", "bfaas-coord", "--metrics", "tcp:9091:interface=\\:\\:"]

# The worker runs as root and its scripts do not, so they cannot access it. util-linux, which confines them, is
# part of the base image.
FROM python AS basher
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        bc bzip2 curl file gawk git jq less patch procps unzip vim-tiny xz-utils zip \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 --shell /bin/bash worker
COPY --from=worker /opt/bfaas /opt/bfaas
ENV RUN_AS=worker HOME=/home/worker
EXPOSE 8001
STOPSIGNAL SIGTERM
# Without twistd, which is slower to start; the service is the same.
ENTRYPOINT ["python", "-m", "bfaas.basher"]
