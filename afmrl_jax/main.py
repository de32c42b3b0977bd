"""python -m afmrl_jax.main --config=configs/agcl.py [--workdir=DIR] [--config.FIELD=VALUE ...]

Reads the flags and runs the program that the config names (runner.py). To import this module
defines flags, so that nobody does.
"""

import logging
import re
import sys
from pathlib import Path

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from afmrl_jax import runner
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import flatten
from afmrl_jax.core.pages import check_page, find_page, load_page

HELP = ("--help", "-help", "-h")
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The program and its settings: a file of configs/, with :ARM where it has arms.",
    # A method outside the package may have fields that no page has; check_page refuses all others.
    lock_config=False,
    accept_new_attributes=True,
)


class _PageParser(flags.ArgumentParser):
    """In the place of ml_collections', which ends in a traceback where a page fails."""

    def parse(self, argument: str) -> ConfigDict:
        return load_page(argument).unlock()


flags.FLAGS["config"].parser = _PageParser()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run lives; the same command again resumes it. Default: runs/PROGRAM.",
)
_PLAN = flags.DEFINE_string(
    "plan",
    None,
    "Instead of a run: what it would need on v5e:16x16, 2xv5e:4x4 (slices), ... or local.",
)


def _parse(argv: list[str]) -> ConfigDict | None:
    """The configuration, locked; None without --config. Raises UserError for wrong flags."""
    try:
        rest = flags.FLAGS([argument for argument in argv if argument not in HELP])[1:]
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        raise UserError(_explain(error)) from None
    if rest:
        flag = f"--config.{rest[0].lstrip('-')}"
        raise UserError(f"{rest[0]!r} is not a flag: did you mean {flag}?")
    if _CONFIG.value is not None:
        check_page(_CONFIG.value.lock())
    return _CONFIG.value


def _explain(error: Exception) -> str:
    """One sentence for flags that could not be read."""
    if isinstance(error, KeyError | AttributeError):  # what config_flags raises for a wrong section
        if near := re.search(r'"(\w+)" instead of "(\w+)"', str(error)):
            return f"the configuration has no field {near[2]!r}: did you mean {near[1]!r}?"
        name = re.search(r"\w+", str(error))[0]
        return f"the configuration has no field {name!r}: --help lists those it has"
    return str(error).strip().splitlines()[-1]  # the lines above are a traceback of the file


def _page() -> tuple[str, Path]:
    """The path that --config names, and the file that was read for it."""
    path = flags.FLAGS["config"].config_filename.split(":")[0]
    return path, find_page(path)


def _help(config: ConfigDict | None) -> str:
    """What --help prints: how to run, and the fields of the configuration where one is named."""
    if config is None:
        advice = "Add --config=FILE before --help to list that file's fields."
        return f"{__doc__.strip()}\n\n{advice}"
    head = f"Fields (--config.FIELD=VALUE; what each means stands beside it in {_page()[1]}):"
    fields = (f"  {name} = {value!r}" for name, value in flatten(config).items())
    return "\n".join([__doc__.strip(), "", head, *fields])


def cli(argv: list[str]) -> int:
    """Parses `argv` and runs; the exit status, 2 where the user got something wrong."""
    try:
        config = _parse(argv)
        if any(argument in HELP for argument in argv):
            print(_help(config))
            return 0
        if config is None:
            raise UserError("say what to run, as --config=configs/agcl.py")
    except UserError as error:
        print(f"afmrl_jax: {error}", file=sys.stderr)
        return 2
    # Orbax warns of its own temporary folders, and tells an error by pages before it raises it.
    absl_logging.set_verbosity("fatal")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("afmrl_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # absl's own handler would say it again
    path, page = _page()
    if page != Path(path):
        logger.info("%s is not in this folder: it is the package's, %s", path, page)
    workdir = Path(_WORKDIR.value or Path("runs") / config.program)
    try:
        runner.run(config, workdir, _PLAN.value)
    except SystemExit:
        raise  # stopped by a signal, when all is saved
    except BaseException as error:
        folder = Path(config.get("checkpoint_dir") or workdir / "checkpoints")
        return runner.end(error, folder.expanduser())
    return 0


if __name__ == "__main__":
    sys.exit(cli(sys.argv))
