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

from importlib.metadata import version
from typing import TYPE_CHECKING


__version__ = version("trl-spin")

if TYPE_CHECKING:
    from .callbacks import SelfPlayCallback
    from .export import load_game
    from .probing import probe
    from .shared_prefix_trainer import SharedPrefixDPOTrainer
    from .spin_config import SPINConfig
    from .spin_trainer import SPINTrainer

_MODULES = {
    "SPINConfig": "spin_config",
    "SPINTrainer": "spin_trainer",
    "SelfPlayCallback": "callbacks",
    "SharedPrefixDPOTrainer": "shared_prefix_trainer",
    "load_game": "export",
    "probe": "probing",
}

__all__ = ["SPINConfig", "SPINTrainer", "SelfPlayCallback", "SharedPrefixDPOTrainer", "load_game", "probe"]


def __getattr__(name: str):
    # Imported on first use: `trl-spin --help` and `import trl_spin` should not load models, trainers or kernels.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
