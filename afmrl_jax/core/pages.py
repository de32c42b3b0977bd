"""The page that --config names: a Python file whose get_config returns a program's fields.

From any folder configs/NAME.py is the package's page, unless that folder has such a file itself.
"""

import difflib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ml_collections import ConfigDict

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import flatten, load_named

Result = TypeVar("Result")
PACKAGED = Path(__file__).parents[1] / "configs"
# ml_collections' message for a field that a locked configuration does not have.
NO_FIELD = re.compile(r'Key "(\w+)" does not exist and cannot be added')
NEAR = re.compile(r'Did you mean "(\w+)" instead of')
PAGES = sorted(p.stem for p in PACKAGED.glob("[a-z]*.py") if p.stem != "common")
OTHERS_PAGES = ("distill", "pretrain")  # of the programs agcl and sft
PROGRAMS = [page for page in PAGES if page not in OTHERS_PAGES]


def find_page(path: str) -> Path:
    """The file at `path`, or the package's page of that name. Raises UserError for neither."""
    if Path(path).is_file():
        return Path(path)
    names = [f"configs/{page}.py" for page in PAGES]
    if Path(path).as_posix() in names:
        return PACKAGED / Path(path).name
    close = difflib.get_close_matches(path, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the package has {', '.join(names)}"
    raise UserError(f"there is no configuration file {path or repr(path)}: {hint}")


def load_page(name: str) -> ConfigDict:
    """Runs a page and returns its fields, locked. name: FILE or FILE:ARM.

    Raises UserError for an error in the file, with its line, and where the file has no such arm or
    does not return a ConfigDict.
    """
    path, *arm = name.split(":", 1)
    page = find_page(path)
    get_config = getattr(_run(page, lambda: _module(page)), "get_config", None)
    if not callable(get_config):
        raise UserError(
            f"{page} has no function get_config, which returns the fields of a program: see "
            f"{PACKAGED / 'agcl.py'}"
        )
    try:
        inspect.signature(get_config).bind(*arm)
    except TypeError:
        advice = f"has no arms: leave out :{arm[0]}" if arm else f"wants an arm: give {path}:ARM"
        raise UserError(f"{page} {advice}") from None
    config = _run(page, lambda: get_config(*arm))
    if type(config) is not ConfigDict:
        raise UserError(
            f"{page}: get_config returned a {type(config).__name__}, expected a ConfigDict"
        )
    return config.lock()


def _module(page: Path) -> ModuleType:
    # A page may import its neighbours by their folder's name. Being last, the path hides no module.
    sys.path.append(str(page.absolute().parent.parent))
    loader = importlib.machinery.SourceFileLoader("config_page", str(page))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("config_page", loader))
    importlib.invalidate_caches()  # or a neighbour written just now may not be found
    sys.modules["config_page"] = module  # dataclasses and pickle look for a class's module here
    loader.exec_module(module)
    return module


def _run(page: Path, call: Callable[[], Result]) -> Result:
    """The result of `call`, which runs code of the page. Raises UserError where that fails."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(page)]
        where = f"{page} line {lines[-1]}" if lines else str(page)
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, SyntaxError):
            where, reason = f"{error.filename} line {error.lineno}", error.msg
        elif isinstance(error, ValueError):  # raised, for one, for an arm that a page does not have
            reason = str(error)
        elif missing := NO_FIELD.search(str(error)):  # the message goes on with all fields
            near = NEAR.search(str(error))
            hint = f": did you mean {near[1]!r}?" if near else ""
            reason = f"the configuration has no field {missing[1]!r}{hint}"
        elif isinstance(error, ImportError) and (error.name or "").split(".")[0] == "configs":
            reason += "; write `from afmrl_jax.configs import NAME` for a page of the package"
        raise UserError(f"{where}: {' '.join(reason.split())}") from None


def program_fields(program: str) -> dict[str, Any]:
    """Dotted field -> value of the package's page for a program; {} for an unknown program."""
    if program not in PROGRAMS:
        return {}
    return flatten(importlib.import_module(f"afmrl_jax.configs.{program}").get_config())


def check_program(config: ConfigDict) -> None:
    """Raises UserError where the configuration does not name a program that exists."""
    program = config.get("program")
    if program not in PROGRAMS:
        problem = "names no program" if program is None else f"names the program {program!r}"
        raise UserError(f"the configuration {problem}: `program` is one of {', '.join(PROGRAMS)}")


def check_page(config: ConfigDict) -> None:
    """Raises UserError where the fields, or their types, are not those of the package's page.

    A field that no program reads, such as a misspelt name, would be ignored in silence. A page that
    names a method outside the package may have more fields: `check_method_fields` checks them.
    """
    check_program(config)
    program = config.program
    default, fields, page = program_fields(program), flatten(config), f"configs/{program}.py"
    if not outside_methods(fields):
        _check_read(config, set(default))
    if missing := sorted(default.keys() - fields.keys()):
        values = ", ".join(f"{name} ({default[name]!r} in {page})" for name in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"the configuration lacks {values}{more}: begin your page with config = "
            f"afmrl_jax.configs.{program}.get_config()"
        )
    for name in default:
        value, expected = fields[name], type(default[name])
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise UserError(
                f"{name} is {value!r}, a {type(value).__name__}: expected {expected.__name__}, as "
                f"{default[name]!r} in {page}"
            )


def outside_methods(fields: Mapping[str, Any]) -> dict[str, str]:
    """Field -> module:Class, of the methods outside the package that dotted fields name.

    A page of several programs names a method of each, as `again.method`.
    """
    methods = {name: x for name, x in fields.items() if name.split(".")[-1] == "method"}
    return {name: x for name, x in methods.items() if isinstance(x, str) and ":" in x}


def check_method_fields(config: ConfigDict) -> None:
    """Raises UserError where a field is neither of the package's page nor among the options of a
    method outside the package.

    It imports the methods, and they JAX: call it once JAX may be imported.
    """
    fields, read = flatten(config), set(program_fields(config.program))
    for field, method in outside_methods(fields).items():
        section = field.removesuffix("method")
        for options in getattr(load_named(method, {}, field), "options", ()):
            read |= {section + name for name in options.names()}
    _check_read(config, read)


def _check_read(config: ConfigDict, read: Set[str]) -> None:
    """Raises UserError for a field that is not among those that the program reads."""
    for name in flatten(config).keys() - read:
        close = difflib.get_close_matches(name, read, n=1)
        hint = f": did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"the configuration has {name!r}, which {config.program} does not read{hint}"
        )
