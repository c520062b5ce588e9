# Two images of one program. `--target coord` is the coordinator, `--target basher` the worker.

FROM debian:bookworm-slim AS python
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/bfaas/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# All that Python needs, as bytecode too: a worker starts for every run.
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
# twistd looks for its plugins once, here; nobody else may write what it finds.
RUN pip install --no-cache-dir --no-compile --disable-pip-version-check --no-deps /src \
    && pip uninstall -y --quiet pip setuptools \
    && python -m compileall -q -j 0 /opt/bfaas/lib \
    && twistd --help > /dev/null

# The worker speaks no TLS, and asks nobody.
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

# The worker is root, so that its scripts, which are not, cannot touch it. util-linux, which holds them, is
# part of the base.
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
# Not twistd, which takes its time to start; the service is the same.
ENTRYPOINT ["python", "-m", "bfaas.basher"]
