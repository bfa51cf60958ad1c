"""``eval.py compare RUN RUN ...``: finished evaluations side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lit_purify.errors import InputError
from lit_purify.evaluation.records import write_whole
from lit_purify.report.comparison import GENERATOR, Comparison


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; as in: eval.py compare runs/first runs/second --output compare.html")


def compare(argv: Sequence[str]) -> None:
    """Prints how evaluations differ from the first of them, and writes a page that shows it.

    Raises:
        InputError: An argument is wrong, a folder holds no finished evaluation, or the page cannot be written.
    """
    parser = _Parser("eval.py compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder; the first is compared to")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page (default: %(default)s)")
    given = parser.parse_args(argv)
    comparison = Comparison(given.runs)
    try:
        if given.output.is_file() and not _is_page(given.output):
            raise InputError(
                f"{given.output}: is there already, and no page of a comparison; choose another file with --output"
            )
        write_whole(given.output, comparison.page())
    except OSError as error:
        raise InputError(f"{given.output}: {str(error.strerror).lower()}; choose another file with --output") from error
    print(f"{comparison.table()}\n\nPage: {given.output}")


def _is_page(path: Path) -> bool:
    """Whether a file is a page of an earlier comparison, which may be written over."""
    return f'content="{GENERATOR}"'.encode() in path.read_bytes()[:1000]
