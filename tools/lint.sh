#!/bin/sh
# Style, spelling and stray notebook output: tools/lint.sh check, or tools/lint.sh repair
PATH=$(dirname "$0")/../.venv/bin:$PATH
status=0
if [ "$1" = repair ]; then
    ruff check --fix . || status=1
    ruff format . || status=1
    find book -name '*.ipynb' -not -path '*/.*' -exec nbstripout --keep-count {} +
else
    ruff check . || status=1
    ruff format --check . || status=1
    find book -name '*.ipynb' -not -path '*/.*' -exec nbstripout --keep-count --verify {} + || status=1
fi
codespell || status=1
exit $status
