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

"""The part of the model card that tells how the model was made by self-play."""

import json
from pathlib import Path
from typing import Any


RECORD = "self_play.json"
_COLUMNS = {
    "iteration": "iteration",
    "λ": "beta",
    "learning rate": "learning_rate",
    "passes": "num_train_epochs",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "held-out accuracy": "eval_rewards/accuracies",
    "held-out margin": "eval_rewards/margins",
    "held-out NLL": "eval_nll/real",
    "length real": "self_play/mean_length_real",
    "length generated": "self_play/mean_length_generated",
    "truncated": "self_play/truncated",
    "empty": "self_play/empty",
    "identical": "self_play/identical",
}


def read_records(output_dir: str, num_iterations: int) -> list[dict[str, Any]]:
    """
    Records of the finished iterations, as they were written beside each iteration's model.

    Args:
        output_dir (`str`):
            Output directory of the run.
        num_iterations (`int`):
            Number of finished iterations.

    Returns:
        `list[dict[str, Any]]`: Settings and metrics, one flat dict per iteration.
    """
    paths = [Path(output_dir) / f"iteration-{t}" / RECORD for t in range(num_iterations)]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def iteration_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """
    Table of the iterations.

    Args:
        records (`list[dict[str, Any]]`):
            Settings and metrics, one flat dict per iteration.

    Returns:
        `list[list[str]]`: Cells: titles, then one row per iteration, of the columns that have a value.
    """
    columns = {title: key for title, key in _COLUMNS.items() if any(key in record for record in records)}
    cells = [["" if key not in record else f"{record[key]:.4g}" for key in columns.values()] for record in records]
    return [list(columns), *cells]


def add_self_play_section(
    card: str,
    records: list[dict[str, Any]],
    base_model: str,
    revision: str | None,
    data: str,
    settings: dict[str, Any],
    model_name: str,
) -> str:
    """
    Adds base model, data, lineage, settings and a table of the iterations to a model card.

    Args:
        card (`str`):
            Model card as TRL writes it.
        records (`list[dict[str, Any]]`):
            Settings and metrics of the finished iterations, see [`read_records`].
        base_model (`str`):
            Name or path of the model that self-play started from.
        revision (`str`, *optional*):
            Its revision.
        data (`str`):
            What it played on.
        settings (`dict[str, Any]`):
            Options of the run.
        model_name (`str`):
            Name of this model.

    Returns:
        `str`: Model card.
    """
    # TRL drops the base model if it is a local path and then prints None, also for the model itself if it has no Hub
    # name (trl 1.16, `create_model_card`)
    base_model = base_model or "a model without a name"
    card = card.replace("[None](https://huggingface.co/None)", f"`{base_model}`")
    card = card.replace('model="None"', f'model="{model_name}"')
    lineage = [f"`{base_model}`" + (f" (revision `{revision}`)" if revision else "")]
    lineage += [f"iteration {record['iteration']}" for record in records]
    section = [
        "## Self-play",
        "",
        "Trained with [trl-spin](https://pypi.org/project/trl-spin/): at each iteration the current model is the "
        "opponent that answers the prompts and the reference, and learns to tell the real answers from its own.",
        "",
        f"- Base model: {lineage[0]}",
        f"- Data: {data}",
        f"- Lineage: {' → '.join(lineage)}",
        f"- Settings: {', '.join(f'{key} = {value}' for key, value in settings.items())}",
        "",
    ]
    if records:
        titles, *rows = iteration_rows(records)
        lines = [titles, ["---:"] * len(titles), *rows]
        section += [*(f"| {' | '.join(line)} |" for line in lines), ""]
    heading = "### Framework versions"
    before, found, after = card.partition(heading)
    return before + "\n".join(section) + "\n" + found + after
