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

"""What completes the prompts. A file in here is an engine: its options and its checks."""

from importlib import import_module
from pkgutil import iter_modules

from .base import ENGINES as ENGINES
from .base import Engine as Engine
from .base import SamplingOptions as SamplingOptions
from .base import chosen_engine as chosen_engine
from .generate import Generate as Generate


for module in iter_modules(__path__):  # each registers its engine
    import_module(f"{__name__}.{module.name}")
