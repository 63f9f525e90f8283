"""Runs the Python blocks of a Markdown page in their order, in the current folder.

python tests/run_page.py README.md [NUMBER_OF_BLOCKS]
"""

import re
import sys
import time
from pathlib import Path


def main() -> None:
    page, number = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    if not blocks:
        raise SystemExit(f"{page} has no Python block")
    started, names = time.perf_counter(), {"__name__": "__main__"}
    for block in blocks[:number]:
        exec(compile(block, str(page), "exec"), names)
    print(f"{page}: {len(blocks[:number])} Python blocks ran in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
