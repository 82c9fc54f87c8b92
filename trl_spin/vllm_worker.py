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
vLLM in a process of its own, for as long as the opponent stays the same. It is run by its path and imports nothing of
trl-spin, so that vLLM may live in another environment than training.
"""

import sys
from multiprocessing.connection import Connection


def main(connection: Connection):
    """
    Is sent vLLM's options, those of sampling, and the folder of an adapter or `None`; and then prompts, a seed for
    each, the longest completion, the temperature, and whether log-probs are asked for. Sends back `None` when the model is loaded; and
    then, for each prompt, the ids of its completion and their summed log-prob or `None`. Whatever goes wrong is sent
    back as text.
    """
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        options, sampling, adapter = connection.recv()
        llm = LLM(**options)
        adapter = adapter and LoRARequest("opponent", 1, adapter)
        if adapter:
            llm.llm_engine.add_lora(adapter)
        connection.send(None)
        while True:
            prompts, seeds, max_tokens, temperature, with_logps = connection.recv()
            sampling |= {"max_tokens": max_tokens, "temperature": temperature, "logprobs": 0 if with_logps else None}
            parameters = [SamplingParams(**sampling, seed=seed) for seed in seeds]
            prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
            completions = []
            for request in llm.generate(prompts, parameters, use_tqdm=False, lora_request=adapter):
                output = request.outputs[0]
                logps = output.logprobs and sum(
                    p[i].logprob for p, i in zip(output.logprobs, output.token_ids, strict=True)
                )
                completions.append((list(output.token_ids), logps))
            connection.send(completions)
    except (EOFError, BrokenPipeError):  # there are no more prompts, or the run has ended
        pass
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
