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

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The program and its settings: a file of configs/, with :ARM where it has arms."
)


class _PageParser(flags.ArgumentParser):
    """In the place of ml_collections', which ends in a traceback where a page fails."""

    def parse(self, argument: str) -> ConfigDict:
        return load_page(argument)


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


def _explain(error: Exception) -> str:
    """One sentence for flags that could not be read."""
    if isinstance(error, KeyError | AttributeError):  # what config_flags raises for a wrong field
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
    lines = [__doc__.strip(), ""]
    if config is None:
        return "\n".join([*lines, "Add --config=FILE before --help to list that file's fields."])
    lines.append(
        f"Fields (--config.FIELD=VALUE; what each means stands beside it in {_page()[1]}):"
    )
    lines += [f"  {name} = {value!r}" for name, value in flatten(config).items()]
    return "\n".join(lines)


def cli(argv: list[str]) -> int:
    """Parses `argv` and runs; the exit status, 2 where the user got something wrong."""
    wants_help = any(a in ("--help", "-help", "-h") for a in argv)
    try:
        rest = flags.FLAGS([a for a in argv if a not in ("--help", "-help", "-h")])[1:]
        if _CONFIG.value is not None:
            check_page(_CONFIG.value)
    except UserError as error:
        print(f"afmrl_jax: {error}", file=sys.stderr)
        return 2
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        print(f"afmrl_jax: {_explain(error)}", file=sys.stderr)
        return 2
    if wants_help:
        print(_help(_CONFIG.value))
        return 0
    if rest:
        print(
            f"afmrl_jax: {rest[0]!r} is not a flag: did you mean --config.{rest[0].lstrip('-')}?",
            file=sys.stderr,
        )
        return 2
    # Orbax warns of its own temporary folders, and tells an error by pages before it raises it.
    absl_logging.set_verbosity("fatal")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("afmrl_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # absl's own handler would say it again
    config = _CONFIG.value
    if config is None:
        print("afmrl_jax: say what to run, as --config=configs/agcl.py", file=sys.stderr)
        return 2
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
