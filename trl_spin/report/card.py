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

# Private to TRL, whose own card shows these links (trl 1.16, `create_model_card`)
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url


def write_model_card(
    path: str | Path,
    *,
    base_model: str | None,
    dataset_name: str | None,
    model_name: str,
    records: list[dict[str, Any]],
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
        dataset_name (`str`, *optional*):
            Dataset on the Hub to link to.
        model_name (`str`):
            Name of the model.
        records (`list[dict[str, Any]]`):
            Records of the finished iterations, see [`read_records`].
        tags (`list[str]`):
            Tags.
        **shown:
            What else model_card.md shows: `hub_model_id`, repository of the model on the Hub or `None`; `revision` of
            the base model or `None`; `data`, the training data in words; `settings`, options of the run by name; `rows`,
            a table of the models, titles first.
    """
    if (trackio_url := get_trackio_space_url()) is not None:
        # In place of the tag that trackio has set, which names the Space but not the run
        tags = [*(tag for tag in tags if not tag.startswith("trackio:")), f"trackio:{trackio_url}"]
    if "JOB_ID" in os.environ:
        tags = [*tags, "hf_jobs"]
    card_data = ModelCardData(
        # Nobody else can follow a local path
        base_model=None if not base_model or os.path.isdir(base_model) else base_model,
        datasets=dataset_name,
        library_name="transformers",
        licence="license",
        model_name=model_name,
        tags=list(dict.fromkeys(["generated_from_trainer", *tags])),
    )
    # The template sees the fields of `card_data` that are not None as well
    ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).with_name("model_card.md")),
        start=base_model,
        records=records,
        # There is a run only where wandb has been imported
        wandb_run=getattr(sys.modules.get("wandb"), "run", None),
        trackio_url=trackio_url,
        comet_url=get_comet_experiment_url(),
        version=version,
        **shown,
    ).save(path)
