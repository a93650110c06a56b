#!/bin/sh
# Packs the plug-in with its library: filewatch.tar.gz, the same bytes from the same files.
#   ./pack.sh [KEY.pem]     with a key (openssl genpkey -algorithm ed25519 -out KEY.pem): signs it too
set -eu
cd "$(dirname "$0")"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cp filewatch "$build/"
cp -r ../../../plugin/src/outrider_plugin "$build/"   # the program finds it beside itself
find "$build" -name __pycache__ -prune -exec rm -rf {} +
tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C "$build" -cf - filewatch outrider_plugin |
    gzip -n > filewatch.tar.gz
echo "sha256: $(sha256sum filewatch.tar.gz | cut -d' ' -f1)"
if [ $# -gt 0 ]; then
    openssl pkeyutl -sign -inkey "$1" -rawin -in filewatch.tar.gz -out "$build/signature"
    echo "signature: $(base64 -w0 "$build/signature")"
fi
