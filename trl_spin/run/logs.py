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

"""What the package says while it runs."""

import logging

from accelerate import PartialState
from accelerate.logging import MultiProcessAdapter
from tqdm.auto import tqdm


class Logger(MultiProcessAdapter):
    """accelerate's logger. It says which process speaks where there are several, and writes above progress bars."""

    log = tqdm.external_write_mode()(MultiProcessAdapter.log)

    def process(self, msg, kwargs):
        ranked, kwargs = super().process(msg, {"stacklevel": 3} | kwargs)  # the caller's line, two methods further up
        return ranked if PartialState().num_processes > 1 else msg, kwargs


logger = Logger(logging.getLogger("trl_spin"), {})
