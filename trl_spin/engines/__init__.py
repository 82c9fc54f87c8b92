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

"""What completes the prompts, token ids in, token ids out. One file per engine: its options, its checks, its line in the plan."""

from .base import ENGINES, Engine, SamplingOptions, chosen_engine
from .continuous_batching import ContinuousBatching
from .generate import Generate
from .vllm import VLLM


__all__ = ["ENGINES", "VLLM", "ContinuousBatching", "Engine", "Generate", "SamplingOptions", "chosen_engine"]
