"""Writes a model as a folder that transformers loads, an encoder's sentence-transformers as well.

1. Find the model and the record of its run; read its parameters, with adapters merged.
2. Write weights, tokenizer, processor and model card into a temporary folder; also an encoder's
   pooling, or a generator's prompt and stop tokens.
3. Rename the folder to its place, whole.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.folder import check_processor, write_folder
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.options import DTYPES, EncoderOptions
from afmrl_jax.assembly.pretrained import RECORD, Pretrained, find_pretrained, model_class_of
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.files import whole_folder
from afmrl_jax.core.options import Options, among, check_options
from afmrl_jax.programs.evaluate import FOLDER_OPTIONS
from afmrl_jax.retrieval.scores import results_table
from afmrl_jax.training import answer_evaluator


@dataclass(frozen=True)
class ExportedFolder(Options, section=""):
    """The model that is exported, and the folder."""

    checkpoint: str  # a workdir, a checkpoint or a Hugging Face folder
    best: bool  # of a workdir, the best on validation instead of the last
    out: str  # the folder to write
    dtype: str = among(*DTYPES)  # of the weights written


SHARES_WORKDIR = True  # all processes read it
OPTIONS = (ExportedFolder, *FOLDER_OPTIONS)


def main(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Writes the folder config.out; see configs/export.py."""
    # ---- model
    check_options(config, OPTIONS)
    if not config.checkpoint or not config.out:
        raise UserError(
            "say what to export and where to, as --config.checkpoint=runs/agcl "
            "--config.out=exported"
        )
    if jax.process_count() > 1:
        raise UserError("export runs in one process: it writes one folder from whole parameters")
    out = Path(config.out)
    check_place(out)
    model_class = model_class_of(config.checkpoint, best=config.best)
    source = find_pretrained(config.checkpoint, model_class, best=config.best)
    model = source.with_options(EncoderOptions.of(config))  # a generator always has a run
    check_processor(model)  # row sizes that do not fit should raise before weights are read
    params = source.load(abstract_params(model, mesh))

    # ---- folder
    with whole_folder(out, replace=True) as folder:
        evaluation = _evaluation(source, model_class)
        write_folder(folder, model, params, source, dtype=config.dtype, evaluation=evaluation)
    print(f"{source.label} is in {out}", flush=True)


def check_place(out: Path) -> None:
    """Raises UserError where `out` is anything but free, empty, or an earlier export."""
    if out.is_dir() and ((out / RECORD).is_file() or not any(out.iterdir())):
        return
    if out.exists() or out.is_symlink():
        raise UserError(
            f"{out} exists and is no folder that export wrote (it has no {RECORD}): name another "
            "--config.out, or empty it first"
        )


def _evaluation(source: Pretrained, model_class: type[Encoder] | type[Generator]) -> str:
    """The evaluation of the run that trained the model, in Markdown; "" where there is none."""
    if not source.evaluation:
        return ""
    if model_class is Encoder:
        return results_table({f"step {source.step}": source.evaluation}).strip()
    if source.config["program"] == "sft":
        return answer_evaluator.results_table(source.evaluation).replace("\nF1", "\n\nF1")
    return f"```json\n{json.dumps(source.evaluation, indent=2)}\n```"
