"""Write the addresses of the repository and of the published book into _config.yml: the publishing workflow knows them.

``python tools/add_addresses.py REPOSITORY_URL BRANCH BOOK_URL``
"""

import sys
from pathlib import Path

import yaml

CONFIG = Path(__file__).resolve().parent.parent / "_config.yml"


def main(repository, branch, book):
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["repository"] = {"url": repository, "branch": branch}
    config["html"] |= {
        "baseurl": book,
        "use_edit_page_button": True,
        "use_issues_button": True,
        "use_repository_button": True,
    }
    CONFIG.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
