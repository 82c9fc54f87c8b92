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

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


logger = logging.getLogger(__name__)

SCHEMA_VERSION = 5
# In `self_play/iteration-<t>` (the first also beside each model), in `self_play`, and in `iteration-<t>`
MANIFEST, PROBES, EXAMPLES = "manifest.json", "probes.json", "examples.json"
HISTORY, SETTINGS, SFT = "log_history.json", "run.json", "sft.json"
RECORD = "self_play.json"
# Options of an iteration that stand in its record
RECORDED_OPTIONS = ("beta", "learning_rate", "num_train_epochs")


def game_dir(output_dir: str | Path, iteration: int) -> Path:
    """Where the pairs of an iteration are."""
    return Path(output_dir) / "self_play" / f"iteration-{iteration}"


def model_dir(output_dir: str | Path, iteration: int) -> Path:
    """Where the model that an iteration made is; -1 for the one that self-play started from, if it is kept."""
    return Path(output_dir) / (f"iteration-{iteration}" if iteration >= 0 else "self_play/base")


def load_json(path: Path) -> Any:
    """Content of a JSON file, or `None` if there is none. Raises a `ValueError` that names it if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}. Restore it from a copy.") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """
    Content of a file that [`write_json`] wrote, or `None` if there is none. Raises a `ValueError` that names it if it
    is damaged, or of another version of the package.
    """
    if (content := load_json(path)) is None:
        return None
    schema, written = (isinstance(content, dict) and content.pop(key, None) for key in ("schema_version", "sha256"))
    if schema and schema != SCHEMA_VERSION:
        found = f"{path} has the schema version {schema}, this trl-spin reads {SCHEMA_VERSION}"
        raise ValueError(f"{found}. Use the version that wrote it ({content.get('versions')}), or a new `output_dir`.")
    if written != _json_checksum(content):
        raise ValueError(f"{path} is damaged: it does not match its checksum. Restore it, or use a new `output_dir`.")
    return content


def read_intact(path: Path, loss: str) -> dict[str, Any] | None:
    """Like [`read_json`], for what a run can go on without: says what is lost if the file is damaged."""
    try:
        return read_json(path)
    except ValueError as error:
        logger.warning(f"{error} {loss}")
        return None


def read_records(output_dir: str | Path, num_iterations: int) -> list[dict[str, Any]]:
    """Settings and metrics of the finished iterations, one flat dict each, as they lie beside each model."""
    loss = "Until then, its iteration is missing in tables and comparisons."
    records = (read_intact(model_dir(output_dir, t) / RECORD, loss) for t in range(num_iterations))
    return [record for record in records if record is not None]


@contextmanager
def atomic_open(path: Path, writer: str = ""):
    """
    A temporary file that takes its final name when it is complete and synced to disk. Where several may write the same
    file at the same time, each needs a name of its own as the `writer`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}{writer}.tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def write_json(path: Path, content: Any):
    """Writes a JSON file, complete or not at all. A dict gets a checksum, for [`read_json`]."""
    if isinstance(content, dict):
        content = {"schema_version": SCHEMA_VERSION, "sha256": _json_checksum(content), **content}
    with atomic_open(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode())


def _json_checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def sync(path: Path):
    """Makes a file, or the names in a directory, durable."""
    if path.is_file() or os.name == "posix":  # elsewhere, directories cannot be opened
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def checksums(paths: Iterable[Path]) -> list[str | None]:
    """SHA-256 of each file; `None` if there is none."""

    def checksum(path: Path) -> str | None:
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing needs no interpreter lock
        return list(pool.map(checksum, paths))


def seal(directory: Path, **origin: Any):
    """
    Makes a model or checkpoint durable and, last, writes down where it belongs and the checksums of its files. Nothing
    is loaded from the model card and the record, which may be edited, nor from what a killed run has left half-written.
    """
    paths = [path for path in directory.rglob("*") if path.name not in (MANIFEST, RECORD, "README.md")]
    paths = sorted(path for path in paths if path.suffix != ".tmp")
    for path in paths:
        sync(path)
    files = zip((path.relative_to(directory).as_posix() for path in paths), checksums(paths), strict=True)
    files = [{"file": name, "sha256": checksum} for name, checksum in files if checksum is not None]
    write_json(directory / MANIFEST, {**origin, "files": files})


def find_fault(directory: Path, **origin: Any) -> str | None:
    """
    What is wrong with a game, model or checkpoint that should belong to `origin`, naming the file; `None` if it does,
    and all files of its manifest are there and intact.
    """
    manifest = directory / MANIFEST
    try:
        content = read_json(manifest)
    except ValueError as error:
        return str(error).removesuffix(".")
    if content is None:
        return f"{manifest} is missing"
    for name, value in origin.items():
        if content.get(name) != value:
            return f"{manifest} belongs to another {name} ({content.get(name)!r} instead of {value!r})"
    files = {directory / file["file"]: file["sha256"] for file in content.get("files") or content["shards"]}
    for path, checksum in zip(files, checksums(files), strict=True):
        if checksum != files[path]:
            return f"{path} is {'damaged: it does not match its checksum' if checksum else 'missing'}"
    return None


def existing(directory: Path) -> Path:
    """The directory, or the nearest parent that exists."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())


@contextmanager
def explain_write_error(directory: str | Path):
    """Adds directory, free space and the way out to a failed write: torch and safetensors do not speak of disks."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = f"{shutil.disk_usage(existing(Path(directory))).free / 1e9:.2f} GB are free there"
        remedy = "What was saved before is intact: make room (or lower `save_total_limit`) and resume."
        raise OSError(f"Writing to {directory} failed: {error}. {free}. {remedy}") from error
