"""`python -m bench [NAME ...]`: run the benchmarks, each in a fresh process, then make docs/benchmarks.md.

`python -m bench --docs` makes the page alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench.report import PAGE, find_benchmarks, make_page
from pipeline.runtime.files import save_text


def main() -> int:
    """Run what is asked for; a benchmark that fails leaves its old results and makes the exit code 1."""
    known = find_benchmarks()
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all without")
    parser.add_argument("--docs", action="store_true", help="only make the page from the results there are")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    failed = []
    for name in [] if options.docs else options.names or known:
        print(f"bench: {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"bench.{name}"]).returncode:
            failed.append(name)
    save_text(PAGE, make_page())
    print(f"bench: wrote {PAGE}")
    if failed:
        print(f"bench: failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
