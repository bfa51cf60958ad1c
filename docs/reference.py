"""Writes docs/reference.md from the code: ``python docs/reference.py`` in the root of the repository."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import docstring_parser
import lightning as L
from lightning.pytorch.loggers import Logger

ROOT = Path(__file__).parent.parent
# Run as a script, this folder is on the path, the repository is not.
sys.path.insert(0, str(ROOT))

from lit_purify import attacks, callbacks, data, defense, evaluation, models  # noqa: E402
from lit_purify.checks.audit import AuditingTrainer  # noqa: E402
from lit_purify.evaluation.own_images import PurifyingTrainer  # noqa: E402
from lit_purify.training.export import ExportingTrainer  # noqa: E402

PAGE = ROOT / "docs" / "reference.md"
HEAD = """\
# Reference of configurations

Written by `python docs/reference.py` from the code; a test compares the two. Change docstrings, not this page.

A configuration holds `model` (a task), `data` (a datamodule), `trainer`
([Lightning's](https://lightning.ai/docs/pytorch/stable/common/trainer.html)), `seed_everything` and `run` (the folder
that everything is written to). Classes are given by name, with their arguments:

```yaml
class_path: PGD
init_args: {norm: linf, eps: 8/255, steps: 20, step_size: 1/255}
```

What stands on this page goes by its short name, but for loaders, `lit_purify.models.load_...`; a class of yours goes by
its import path. Every key is a flag as well, `--model.init_args.attacks.pgd.init_args.steps 50`. With several
`--config`, later ones change what they state. An argument without a default must be given; `null` is Python's `None`.
"""


class Section(NamedTuple):
    """The public things of a package that ``chosen`` is true of, but for the arguments that are ``given`` to them."""

    title: str
    where: str
    package: ModuleType
    chosen: Callable[[Any], bool]
    given: tuple[str, ...] = ()


def classes(*bases: type) -> Callable[[Any], bool]:
    """Whether something is a class under one of the bases that can be made."""
    return lambda thing: inspect.isclass(thing) and issubclass(thing, bases) and not inspect.isabstract(thing)


def networks(kind: type) -> Callable[[Any], bool]:
    """Whether something is a class of such networks, or a function that returns one."""

    def chosen(thing: Any) -> bool:  # noqa: ANN401
        returned = inspect.isfunction(thing) and vars(sys.modules[thing.__module__])[thing.__annotations__["return"]]
        return classes(kind)(thing) or (inspect.isclass(returned) and issubclass(returned, kind))

    return chosen


NETWORKS = ("denoiser", "classifier")
SECTIONS = [
    Section("Tasks", "`model`", evaluation, classes(L.LightningModule)),
    Section("Datamodules", "`data`", data, classes(data.ImageDataModule)),
    Section("Subsets", "`data.init_args.subset`", data, classes(data.Subset)),
    Section("Classifiers", "`model.init_args.classifier`", models, networks(models.Classifier)),
    Section("Denoisers", "`model.init_args.denoiser`", models, networks(models.Denoiser)),
    Section("Purifiers", "`model.init_args.defenses.NAME`", defense, classes(defense.Purifier), NETWORKS),
    Section("Masks", "`mask` of a purifier or a training", defense, classes(defense.Mask)),
    Section("Attacks", "`model.init_args.attacks.NAME`", attacks, classes(attacks.Attack)),
    Section("Gradients", "`model.init_args.gradients.NAME`, by the attack's name", defense, classes(defense.Gradient)),
    Section("Callbacks and loggers", "`trainer.callbacks`, `trainer.logger`", callbacks, classes(L.Callback, Logger)),
]
COMMANDS = {
    "eval.py gradcheck": AuditingTrainer.gradcheck,
    "eval.py audit": AuditingTrainer.audit,
    "eval.py purify": PurifyingTrainer.purify,
    "eval.py predict": PurifyingTrainer.predict,
    "train.py export": ExportingTrainer.export,
}
WHERE = [*(section.package for section in SECTIONS), AuditingTrainer, PurifyingTrainer]
"""Where docstrings refer to."""


def page() -> str:
    """All of it."""
    return "\n".join([HEAD, *shipped(), *(part for section in SECTIONS for part in written(section)), *commands()])


def shipped() -> Iterator[str]:
    """The configurations of the repository, by their first comments."""
    yield "## Configurations that ship\n\n| file | what it is |\n|---|---|"
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        comment = re.match(r"(?:#.*\n)*", path.read_text())
        assert comment is not None
        said = comment[0].replace("#", "")
        yield f"| [`{path.parent.name}/{path.name}`](../{path.relative_to(ROOT)}) | {cell(said)} |"
    yield ""


def written(section: Section) -> Iterator[str]:
    """Heading and entries."""
    yield f"## {section.title}\n\nUnder {section.where}.\n"
    for name in section.package.__all__:
        thing = getattr(section.package, name)
        if section.chosen(thing):
            yield f"### `{name}`\n\n{entry(thing, section.given)}"


def commands() -> Iterator[str]:
    """Options of the commands themselves."""
    yield "## Commands\n\nTheir own options, `--NAME VALUE`; all take `--config` as well.\n"
    for name, command in COMMANDS.items():
        yield f"### `{name}`\n\n{entry(command, ('self', 'model', 'datamodule', 'weights_only'))}"


def entry(thing: Any, given: tuple[str, ...]) -> str:  # noqa: ANN401
    """What the docstring says, and a table of the arguments that are not given."""
    doc = parsed(thing)
    said = "\n\n".join(part for part in (doc.short_description, doc.long_description) if part)
    rows = [row(maker, parameter) for maker, parameter in parameters(thing) if parameter.name not in given]
    table = ["| argument | type | default | meaning |", "|---|---|---|---|", *rows] if rows else ["No arguments."]
    return "\n".join([escaped(said), "", *table, ""])


def parameters(thing: Any) -> Iterator[tuple[Any, inspect.Parameter]]:  # noqa: ANN401
    """Parameters, each with what it belongs to; ``**arguments`` stand for those of the class above."""
    above = [kind for kind in inspect.getmro(thing) if "__init__" in vars(kind)] if inspect.isclass(thing) else [thing]
    seen = set()
    for maker in above:
        own = inspect.signature(maker).parameters.values()
        for parameter in own:
            if parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in seen:
                seen.add(parameter.name)
                yield maker, parameter
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own):
            return


def row(maker: Any, parameter: inspect.Parameter) -> str:  # noqa: ANN401
    """Of a table."""
    default = "" if parameter.default is parameter.empty else f"`{value(parameter.default)}`"
    cells = (f"`{parameter.name}`", f"`{accepted(maker, parameter)}`", default, escaped(meaning(maker, parameter.name)))
    return "| " + " | ".join(cell(text) for text in cells) + " |"


def meaning(maker: Any, name: str) -> str:  # noqa: ANN401
    """What a docstring says of an argument, or the one that it refers to."""
    said = next((param.description for param in parsed(maker).params if param.arg_name == name), None) or ""
    other = re.fullmatch(r"(?:See|As for|As in) ``(\w+)``\.?", said)
    found = [getattr(where, other[1]) for where in WHERE if hasattr(where, other[1])] if other else []
    return meaning(found[0], name) if found else said


def accepted(maker: Any, parameter: inspect.Parameter) -> str:  # noqa: ANN401
    """Its type, with choices spelled out."""
    names = vars(sys.modules[maker.__module__])

    def choices(found: re.Match[str]) -> str:
        kind = names.get(found[0])
        return " | ".join(get_args(kind)) if get_origin(kind) is Literal else found[0]

    text = re.sub(r"\b[A-Z]\w+", choices, parameter.annotation)
    text = re.sub(r"Literal\[(.*?)\]", lambda found: " | ".join(re.findall(r"'(.*?)'", found[1])), text)
    # What is called with the networks is a class in a configuration.
    return re.sub(r"Callable\[\[.*?\], (\w+)\]", r"\1", text).replace("None", "null")


def value(default: Any) -> str:  # noqa: ANN401
    """As a configuration writes it."""
    return default if isinstance(default, str) and default else json.dumps(default, default=str)


def parsed(thing: Any) -> docstring_parser.Docstring:  # noqa: ANN401
    """The docstring in parts."""
    return docstring_parser.parse(inspect.getdoc(thing) or "", docstring_parser.DocstringStyle.GOOGLE)


def escaped(text: str) -> str:
    """Of a docstring to Markdown: nothing outside of code is taken for HTML."""
    parts = re.split(r"``(.+?)``", text.replace("``None``", "``null``"))
    return "".join(f"`{part}`" if k % 2 else part.replace("<", "&lt;") for k, part in enumerate(parts))


def cell(text: str) -> str:
    """On one line, without a border in it."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
