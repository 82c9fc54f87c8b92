# Copyright 2026 The trl-spin authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Self-play fine-tuning (SPIN) of a supervised fine-tuned model on its own SFT data.

    trl-spin --model_name_or_path MODEL --dataset_name DATA --output_dir OUTPUT_DIR [options]
    trl-spin --config RECIPE [options]
    trl-spin probe [--num_prompts N] [options of the run]
    trl-spin report OUTPUT_DIR
    trl-spin export OUTPUT_DIR --iteration T --format dpo|kto|sft
    trl-spin generate --iteration T --shard I/N [options of the run]

--help       describes the options that matter most
--help_all   describes all options, those of TRL's and transformers' trainers, too
--config     takes options from a YAML file, or from a recipe of the package; those on the command line override them
--traceback  shows where an error comes from

On several GPUs: accelerate launch -m trl_spin --config RECIPE
"""

import argparse
import functools
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from yaml import YAMLError


RECIPES = {path.stem: str(path) for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}
__doc__ += "\nRecipes, each described at its head:\n"
__doc__ += "".join(f"  {name:16} {Path(path).read_text().splitlines()[0][2:]}\n" for name, path in RECIPES.items())


_OTHERS = "All other options are those of the run: see `trl-spin --help`."


def make_trainer(script_args, training_args, model_args, dataset_args):
    """
    The trainer of the run that the arguments describe.

    Args:
        script_args ([`~sources.DataArguments`]):
            Data.
        training_args ([`SPINConfig`]):
            Game and training.
        model_args ([`~trl.ModelConfig`]):
            Model, adapter and quantization.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            Mixture of data.

    Returns:
        [`SPINTrainer`]: Trainer before training.
    """
    from trl import get_peft_config, get_quantization_config

    from . import SPINTrainer
    from .sources import load_data, load_function

    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    if model_args.dtype is None:
        # TRL computes in float32 unless told otherwise, which takes away what a quantized model is for
        model_args.dtype = "bfloat16" if quantized else "float32"
    if quantized and not model_args.use_peft:
        raise ValueError("A quantized model cannot be trained itself, only an adapter on it: add `--use_peft`.")
    loading = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    loading |= {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    training_args.model_init_kwargs = loading | (training_args.model_init_kwargs or {})

    if model_args.model_name_or_path is None:
        raise ValueError("`--model_name_or_path` is required: the fine-tuned model that self-play starts from.")
    train_dataset, eval_dataset = load_data(script_args, dataset_args)
    if training_args.held_out_size and not script_args.eval_dataset_name:
        eval_dataset = None
    trainer = SPINTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        pair_filter=script_args.pair_filter and load_function("pair_filter", script_args.pair_filter),
    )
    trainer.dataset_name = script_args.dataset_name or ", ".join(part.path for part in dataset_args.datasets)
    trainer.shows_end = False  # not before the model is saved
    return trainer


def run(trainer, dataset_name):
    """Plays, or goes on playing, and saves the last iteration's model in `output_dir`."""
    from .run.checkpoints import save_model
    from .run.files import explain_write_error

    args = trainer.args
    resume = args.resume_from_checkpoint
    # The command line passes text: "true" stands for the newest checkpoint in `output_dir`
    trainer.train(resume_from_checkpoint={"true": True, "false": False}.get(str(resume).lower(), resume))
    if not args.dry_run:
        with explain_write_error(args.output_dir):
            save_model(trainer, args.output_dir)
        if args.push_to_hub:
            trainer.push_to_hub(dataset_name=dataset_name)
        trainer.best_iteration.show_end(saved=args.output_dir)
    trainer.accelerator.wait_for_everyone()  # gloo aborts a process that leaves before another has ended
    trainer.accelerator.end_training()


def short_help(parser, docstring: str) -> str:
    """The essential options of TRL and all of SPIN's, in the groups of their docstring, with the gist of each."""
    from .spin_config import OPTIONS

    options = {option.name: option for cls in parser.dataclass_types for option in fields(cls)}
    formatter = functools.partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=28)
    short = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, formatter_class=formatter)
    group, names = short.add_argument_group("Model, data and training"), [("", name) for name in OPTIONS["essential"]]
    for title, name in names + re.findall(r"^ {8}(?:> (.+)|(\w+) \(.+\):)$", docstring, re.M):
        if title:
            group = short.add_argument_group(title)
            continue
        default = parser.get_default(name) or argparse.SUPPRESS
        gist = re.split(r"[.:;] ", options[name].metadata["help"])[0].rstrip(".")
        group.add_argument(f"--{name}", metavar="", default=default, help=gist)
    return f"{__doc__.lstrip()}\n{short.format_help()}"


def refuse(message: str):
    raise ValueError(message)


def parse(arguments: list[str]) -> tuple | None:
    """What the options of a run say; `None` if they asked for their description."""
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from . import SPINConfig
    from .sources import DataArguments

    parser = TrlParser((DataArguments, SPINConfig, ModelConfig, DatasetMixtureConfig), usage=argparse.SUPPRESS)
    parser.error = refuse  # instead of a page of options
    if "--help_all" in arguments:
        return parser.print_help()
    if {"-h", "--help"} & {*arguments}:
        sys.stdout.write(short_help(parser, SPINConfig.__doc__))
        return None
    if "--config" in arguments:
        position = arguments.index("--config") + 1
        name = "".join(arguments[position : position + 1])
        if not Path(name).is_file():
            if name not in RECIPES:
                raise ValueError(f"`--config {name}` is no file, and none of the recipes: {', '.join(RECIPES)}.")
            arguments[position] = RECIPES[name]
    # Unset, so that `make_trainer` can tell whether the user chose a dtype
    parser.set_defaults(dtype=None)
    return parser.parse_args_and_config(arguments)


def parser_of(command: Callable, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser for a command's own options, which refuses what is wrong with them in one line."""
    parser = argparse.ArgumentParser(f"trl-spin {command.__name__}", None, command.__doc__, epilog, allow_abbrev=False)
    parser.error = refuse
    return parser


def report(arguments: list[str]):
    """Writes report/report.html, one file that needs no network, and the figures as PNG files."""
    from .report.page import write_report

    parser = parser_of(report)
    parser.add_argument("output_dir", help="Output directory of a run, finished or not.")
    sys.stdout.write(f"{write_report(**vars(parser.parse_args(arguments)))}\n")


def export(arguments: list[str]):
    """Writes the pairs of an iteration as text, with a data card, for TRL and other tools."""
    from .export import COLUMNS, export_game

    parser = parser_of(export)
    parser.add_argument("output_dir", help="Output directory of a run, finished or not.")
    parser.add_argument("--iteration", type=int, required=True, help="Iteration whose pairs are written.")
    parser.add_argument("--format", choices=COLUMNS, default="dpo", help="Columns, and which pairs. Default: dpo.")
    sys.stdout.write(f"{export_game(**vars(parser.parse_args(arguments)))}\n")


def generate(arguments: list[str]):
    """Completes a share of a round, for a run that finds it on disk."""
    parser = parser_of(generate, epilog=_OTHERS)
    parser.add_argument("--iteration", type=int, required=True, help="Iteration whose opponent completes.")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="Share I of N, counted from 0. Default: all.")
    options, others = parser.parse_known_args(arguments)
    shard = re.fullmatch(r"(\d+)/(\d+)", options.shard)
    if not shard or int(shard[1]) >= int(shard[2]):
        raise ValueError(f"`--shard {options.shard}` is no share: 0/3, 1/3 and 2/3 make a round.")
    trainer = make_trainer(*parse(others))
    trainer.self_play.complete_share(options.iteration, (int(shard[1]), int(shard[2])))


def probe(arguments: list[str]):
    """Says before any training whether self-play is worth it."""
    from .probing import probe as probe_trainer

    parser = parser_of(probe, epilog=_OTHERS)
    parser.add_argument("--num_prompts", type=int, default=300, help="Number of prompts to complete. Default: 300.")
    options, others = parser.parse_known_args(arguments)
    probe_trainer(make_trainer(*parse(others)), options.num_prompts)


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    if not arguments:
        sys.exit(__doc__.strip())
    # peft imports bitsandbytes, which misses a kernel for weights in 4 bits, also where nothing is quantized
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        if command := {f.__name__: f for f in (report, export, generate, probe)}.get(arguments[0]):
            command(arguments[1:])
        elif parsed := parse(arguments):
            run(make_trainer(*parsed), parsed[0].dataset_name)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, OSError, ImportError, YAMLError) as error:
        # What is said to the user is raised. What fails by itself is a fault, and needs its traceback
        line = traceback.extract_tb(error.__traceback__)[-1].line
        if "--traceback" in sys.argv or not (line.startswith("raise") or isinstance(error, (OSError, ImportError))):
            raise
        rank = os.environ.get("RANK", "0")  # others may fail alone
        sys.exit(f"trl-spin: error: {'' if rank == '0' else f'[rank {rank}] '}{' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
