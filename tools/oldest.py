"""Print the oldest torch and triton that pyproject.toml admits, as requirements for pip."""

import re
from pathlib import Path

text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
for name in ("torch", "triton"):
    print(re.search(rf"""["']({name})>=([\d.]+)""", text).expand(r"\1==\2.*"))
