#!/bin/sh
# What the Dockerfiles of all parts share: one verb for each of their steps. See docs/images.md.
set -eu
TOOLS=/tools/venv
TARGET=/opt/hafnium
# --no-deps: a lock is complete
install() { "$TOOLS/bin/pip" --python "$TARGET/bin/python" install --quiet --no-cache-dir --no-deps "$@"; }

case "$1" in
tools)         # pip, hatchling and the writer of the SBOM: never part of an image
  python3 -m venv "$TOOLS"
  "$TOOLS/bin/pip" install --quiet --no-deps --require-hashes -r /tools/requirements.build.lock
  ;;
requirements)  # a layer of its own: it changes with the lock, not with every commit
  python3 -m venv --without-pip "$TARGET"
  install --require-hashes -r /tools/requirements.lock
  site=$("$TARGET/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  if [ -d "$site/torch" ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends gcc libc6-dev binutils >/dev/null
    python3 /tools/without_cuda.py "$site"
  fi
  # What packages bring for building against them and for testing themselves
  find "$TARGET" -depth -type d \( -name tests -o -name test -o -name include \) -exec rm -rf {} +
  echo "$TARGET/app" >"$site/hafnium.pth"
  # Some libraries ask who they are
  echo 'hafnium:x:65532:65532::/tmp:/usr/sbin/nologin' >>/etc/passwd
  echo 'hafnium:x:65532:' >>/etc/group
  ;;
app)           # the parts' own code: one wheel of 1 MB. And the list of all that there is
  "$TOOLS/bin/pip" wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheel /src
  install --target "$TARGET/app" /wheel/*.whl
  "$TOOLS/bin/cyclonedx-py" environment --output-reproducible --spec-version 1.6 --output-file "$TARGET/app/sbom.cdx.json" "$TARGET/bin/python"
  chmod 644 "$TARGET/app/sbom.cdx.json"
  ;;
*)
  echo "install.sh $1: expected tools, requirements or app" >&2
  exit 2
  ;;
esac
