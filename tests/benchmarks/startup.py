"""The start of a program, against importing what it is made of."""

import subprocess
import sys

from measuring import ROOT, children, compare


def measure(pairs):
    """CPU seconds of whole processes."""

    def python(*arguments):
        return lambda: subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)

    bare = python("-c", "import torch, lightning, timm")
    yield compare("eval.py --help / imports", python("eval.py", "--help"), bare, children, pairs, limit=1.2)
    yield compare("eval.py --print_config / imports", python("eval.py", "--print_config"), bare, children, pairs)
