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
The `trl-spin` command.

```bash
trl-spin \
    --model_name_or_path alignment-handbook/zephyr-7b-sft-full \
    --dataset_name HuggingFaceH4/ultrachat_200k --dataset_train_split train_sft \
    --output_dir zephyr-7b-spin
```

`trl-spin report OUTPUT_DIR` writes a report of a run.

Options may stand in a YAML file, `trl-spin --config recipe.yaml`, which the command line overrides. For several GPUs:
`accelerate launch -m trl_spin --config recipe.yaml`.
"""

import sys
from pathlib import Path


# What loads a local file
_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_data(script_args, dataset_args):
    """
    Loads the dataset that the arguments name: from the Hub, from a local directory, or from local files.

    Args:
        script_args ([`~trl.ScriptArguments`]):
            `dataset_name` may be a JSON, JSON Lines, CSV or Parquet file, which makes up the train split.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            `datasets`, if the data is a mixture.

    Returns:
        [`~datasets.DatasetDict`]: Dataset by split.
    """
    from datasets import load_dataset
    from trl import get_dataset

    if bool(dataset_args.datasets) == bool(script_args.dataset_name):
        raise ValueError(
            f"There must be exactly one source of data: `dataset_name` ({script_args.dataset_name!r}), or a mixture, "
            f"`datasets` ({dataset_args.datasets!r})."
        )
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    name, options = script_args.dataset_name, {"name": script_args.dataset_config}
    if Path(name).suffix in _FILES:
        options = {"data_files": {script_args.dataset_train_split: name}}
        name = _FILES[Path(name).suffix]
    return load_dataset(name, **options, streaming=script_args.dataset_streaming)


def run(script_args, training_args, model_args, dataset_args):
    """
    Plays what the arguments describe, and saves the last iteration's model in `output_dir`.

    Args:
        script_args ([`~trl.ScriptArguments`]):
            Data.
        training_args ([`SPINConfig`]):
            Game and training.
        model_args ([`~trl.ModelConfig`]):
            Model, adapter and quantization.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            Mixture of data.

    Returns:
        [`SPINTrainer`]: Trainer after training.
    """
    from accelerate.logging import get_logger
    from trl import get_peft_config, get_quantization_config

    from . import SPINTrainer

    logger = get_logger(__name__)
    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    if model_args.dtype is None:
        # TRL computes in float32 unless told otherwise, which takes away what a quantized model is for
        model_args.dtype = "bfloat16" if quantized else "float32"
    if quantized and not model_args.use_peft:
        raise ValueError("A quantized model cannot be trained itself, only an adapter on it: add `--use_peft`.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    if model_args.model_name_or_path is None:
        raise ValueError("`--model_name_or_path` is required: the fine-tuned model that self-play starts from.")
    dataset = load_data(script_args, dataset_args)
    trainer = SPINTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.dataset_name = script_args.dataset_name or ", ".join(part.path for part in dataset_args.datasets)
    resume = training_args.resume_from_checkpoint
    # The command line passes text: "true" stands for the newest checkpoint in `output_dir`
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    if training_args.dry_run:
        return trainer

    trainer.save_model(training_args.output_dir)
    logger.info(f"Model saved to {training_args.output_dir}, each iteration's model to its `iteration-<t>` folder.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()
    return trainer


def main():
    if sys.argv[1:2] == ["report"]:
        from .report.page import main as report

        return report(sys.argv[2:])
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from . import SPINConfig

    parser = TrlParser(
        (ScriptArguments, SPINConfig, ModelConfig, DatasetMixtureConfig),
        prog="trl-spin",
        description="Self-play fine-tuning (SPIN) of a supervised fine-tuned model on its own SFT data.",
    )
    # Unset, so that `run` can tell whether the user chose a dtype
    parser.set_defaults(dtype=None)
    run(*parser.parse_args_and_config())


if __name__ == "__main__":
    main()
