#!/usr/bin/env bash
# conformance: FR2.2 FR3.5
# Images are built, imported and run without a registry.
. ./_lib.sh

mkdir "$TMPDIR/context"
echo 'print("built")' >"$TMPDIR/context/app.py"
cat >"$TMPDIR/context/Dockerfile" <<'DOCKER'
FROM base
USER root
RUN mkdir -p /app && echo first >/app/steps
COPY app.py /app/
ENV GREETING=hello
WORKDIR /app
RUN echo second >>steps
USER user
CMD ["python3", "/app/app.py"]
DOCKER
atoll image build -t built:1 "$TMPDIR/context" >/dev/null
equal "$(atoll run --rm built:1)" built
equal "$(atoll run --rm built:1 -- sh -c 'echo $GREETING $(pwd) $(whoami)')" 'hello /app user'
equal "$(atoll run --rm built:1 -- cat steps)" 'first
second'
has "$(atoll image ls)" 'built:1'

# A step that fails says which and why, and leaves no image.
printf 'FROM base\nRUN echo broken >&2; exit 3\n' >"$TMPDIR/context/Dockerfile"
fails 1 'broken|exit.* 3' atoll image build -t broken:1 "$TMPDIR/context"
fails 125 'broken' atoll run --rm broken:1 -- true
printf 'FROM base\nCOPY ../../etc/passwd /x\n' >"$TMPDIR/context/Dockerfile"
fails 1 'passwd|outside|context' atoll image build -t broken:1 "$TMPDIR/context"

# A root as a tar archive.
atoll run --rm built:1 -- tar -C / --exclude=./proc --exclude=./sys --exclude=./dev --exclude=./tmp -cf - ./app >"$TMPDIR/root.tar"
atoll image import "$TMPDIR/root.tar" imported:1 >/dev/null
has "$(atoll image ls)" 'imported:1'
head -c 100000 /dev/urandom >"$TMPDIR/noise.tar"
fails 1 'noise|archive|tar' atoll image import "$TMPDIR/noise.tar" noise:1
fails 1 'folder' atoll image import "$TMPDIR" folder:1

# The host's own system.
equal "$(atoll run --rm host -- sh -c 'echo $((1 + 1))')" 2
