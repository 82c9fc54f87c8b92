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

"""The model card: what TRL's says, and how the model was made by self-play."""

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

# Private to TRL, whose own card shows this link (trl 1.16, `create_model_card`)
from trl.trainer.utils import get_trackio_space_url


def public_name(name: str) -> str:
    """A name on the Hub as it is, of a local path the last part: nobody else has that folder."""
    return Path(name).name if os.path.exists(name) or os.path.isabs(name) else name


def write_model_card(
    path: str | Path,
    *,
    base_model: str | None,
    is_adapter: bool,
    dataset_name: str | None,
    model_name: str,
    tags: list[str],
    **shown: Any,
):
    """
    Writes the card of a model that was made by self-play.

    Args:
        path (`str` or `Path`):
            File to write.
        base_model (`str`, *optional*):
            Name or path of the model that self-play started from.
        is_adapter (`bool`):
            Whether the model is an adapter on it.
        dataset_name (`str`, *optional*):
            Dataset to link to, if it is one on the Hub.
        model_name (`str`):
            Name of the model.
        tags (`list[str]`):
            Tags.
        **shown:
            What else model_card.md shows: `hub_model_id`, repository of the model on the Hub or `None`; `run_name`,
            name of the output directory; `revision` of the base model or `None`; `data`, the training data in words;
            `prompt`, what the quick start asks, text or messages; `settings`, options of the run by name; `rows`, a
            table of the models, titles first; `records` of the finished iterations, see [`read_records`].
    """
    is_public = bool(base_model) and public_name(base_model) == base_model
    card_data = ModelCardData(
        base_model=base_model if is_public else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if is_public else None,
        datasets=dataset_name if dataset_name and public_name(dataset_name) == dataset_name else None,
        library_name="peft" if is_adapter else "transformers",
        model_name=model_name,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["generated_from_trainer", *tags])),
    )
    # The template sees the fields of `card_data` that are not None as well
    ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).with_name("model_card.md")),
        start=base_model and public_name(base_model),
        # There is a run only where wandb has been imported
        wandb_run=getattr(sys.modules.get("wandb"), "run", None),
        trackio_url=get_trackio_space_url(),
        version=version,
        **shown,
    ).save(path)
