# syntax=docker/dockerfile:1
# Compiles and builds the wheels in one stage and installs them, without compilers or
# pip's cache, in another. Serve a folder of images that user 10809 may write:
#   docker run -p 10809:10809 -v /srv/disks:/disks nbdserve serve /disks/vm.qcow2 \
#       --listen 0.0.0.0:10809
FROM python:3.13-slim AS build
# any compiler of that Debian will do
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY deploy/compile.py deploy/
COPY nbdserve nbdserve
RUN python -m venv /opt/nbdserve \
    && NBDSERVE_COMPILE=yes /opt/nbdserve/bin/pip install --no-cache-dir '.[crypto]' \
    && /opt/nbdserve/bin/pip uninstall --yes pip

FROM python:3.13-slim
COPY --from=build /opt/nbdserve /opt/nbdserve
RUN groupadd --gid 10809 nbdserve \
    && useradd --uid 10809 --gid nbdserve --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin nbdserve \
    && install --directory --owner=nbdserve --group=nbdserve /disks
ENV PATH=/opt/nbdserve/bin:$PATH
USER 10809:10809
WORKDIR /disks
VOLUME /disks
EXPOSE 10809
STOPSIGNAL SIGTERM
ENTRYPOINT ["nbdserve"]
CMD ["--help"]
