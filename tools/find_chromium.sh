#!/bin/sh
# Prints the path of a Chromium or Chrome for the page tests: $CHROMIUM, or the first on the path.
for name in ${CHROMIUM:+"$CHROMIUM"} chromium chromium-browser google-chrome google-chrome-stable \
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" /Applications/Chromium.app/Contents/MacOS/Chromium; do
    command -v "$name" && exit
done
echo "No Chromium was found, so the page tests do not run; install one (on Debian: apt-get install chromium)" \
    "or name it: make test CHROMIUM=/path/to/chromium" >&2
exit 1
