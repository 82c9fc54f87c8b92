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

"""Names of a run's files, and files that are written whole or not at all."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


# In `self_play/iteration-<t>`, in `self_play`, and in `iteration-<t>`
MANIFEST, PROBES, EXAMPLES = "manifest.json", "probes.json", "examples.json"
HISTORY, SETTINGS = "log_history.json", "run.json"
RECORD = "self_play.json"
# Options of an iteration that stand in its record
RECORDED_OPTIONS = ("beta", "learning_rate", "num_train_epochs")


def game_dir(output_dir: str | Path, iteration: int) -> Path:
    """Where the pairs of an iteration are."""
    return Path(output_dir) / "self_play" / f"iteration-{iteration}"


def model_dir(output_dir: str | Path, iteration: int) -> Path:
    """Where the model that an iteration made is; -1 for the one that self-play started from, if it is kept."""
    return Path(output_dir) / (f"iteration-{iteration}" if iteration >= 0 else "self_play/base")


def read_json(path: Path) -> Any:
    """Content of a JSON file, or `None` if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_records(output_dir: str | Path, num_iterations: int) -> list[dict[str, Any]]:
    """Settings and metrics of the finished iterations, one flat dict each, as they lie beside each model."""
    records = (read_json(model_dir(output_dir, t) / RECORD) for t in range(num_iterations))
    return [record for record in records if record is not None]


@contextmanager
def atomic_open(path: Path):
    """A temporary file that takes its final name when it is complete and synced to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any):
    """Writes a JSON file, complete or not at all."""
    with atomic_open(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode())


def existing(directory: Path) -> Path:
    """The directory, or the nearest parent that exists."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())


@contextmanager
def explain_write_error(directory: str | Path):
    """Adds directory, free space and the way out to a failed write: torch and safetensors do not speak of disks."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"Writing to {directory} failed: {error}. {shutil.disk_usage(existing(Path(directory))).free / 1e9:.2f} "
            "GB are free there. What was saved before is intact: make room (or lower `save_total_limit`) and resume."
        ) from error
