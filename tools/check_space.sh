#!/bin/sh
# Fails with a sentence when the disk of the project or of temporary files is nearly full: tools/check_space.sh MEGABYTES
for place in . "${TMPDIR:-/tmp}"; do
    free=$(df -Pk "$place" | awk 'NR == 2 { print int($4 / 1024) }')
    if [ "${free:-$1}" -lt "$1" ]; then
        echo "Error: the disk is full: $free MB are free at $(cd "$place" && pwd), and at least $1 MB are needed." >&2
        exit 1
    fi
done
