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
Stands in for vLLM where it is not installed: it knows what of vLLM is used, and completes with transformers. What vLLM
itself makes of it is tested by `.ci/engines`.
"""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM


class SamplingParams(SimpleNamespace):
    def __init__(self, temperature, top_p, top_k, min_p, repetition_penalty, seed, max_tokens, **kwargs):
        given = kwargs.pop("stop_token_ids"), kwargs.pop("logprobs"), kwargs.pop("frequency_penalty", 0.0)
        assert kwargs.pop("ignore_eos") and not kwargs.pop("detokenize")
        if kwargs:
            raise TypeError(f"Unexpected keyword argument {sorted(kwargs)}")
        self.stop, self.logprobs, self.frequency_penalty = given
        self.temperature, self.seed, self.max_tokens = temperature, seed, max_tokens
        self.rest = {"top_p": top_p, "top_k": top_k, "min_p": min_p, "repetition_penalty": repetition_penalty}


class LLM:
    def __init__(self, model, dtype, max_model_len, fault=None, **kwargs):
        assert "RANK" not in os.environ and "MASTER_ADDR" not in os.environ
        if log := os.environ.get("STAND_IN_LOG"):
            with open(log, "a") as file:
                files = sorted(path.name for path in Path(model).iterdir())
                told = {"model": model, "files": files, "dtype": dtype, "max_model_len": max_model_len, **kwargs}
                file.write(json.dumps(told) + "\n")
        if fault == "load":
            raise ValueError("The model does not fit.")
        self.fault = fault
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.llm_engine = SimpleNamespace(add_lora=self._add_lora)

    def _add_lora(self, request):
        from peft import PeftModel

        self.model = PeftModel.from_pretrained(self.model, request.path).merge_and_unload()

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm, lora_request):
        if self.fault == "die":
            os._exit(3)
        if self.fault == "hang":
            (Path(os.environ["STAND_IN_LOG"] + ".hangs")).touch()
            time.sleep(600)
        outputs = []
        for prompt, sampling in zip(prompts, sampling_params, strict=True):
            generator, ids, logprobs = torch.Generator().manual_seed(sampling.seed), [], []
            while len(ids) < sampling.max_tokens and not (ids and ids[-1] in sampling.stop):
                logits = self.model(torch.tensor([prompt["prompt_token_ids"] + ids])).logits[0, -1].float()
                if sampling.temperature == 0:
                    token = logits.argmax().item()
                else:
                    token = (logits / sampling.temperature).softmax(dim=-1).multinomial(1, generator=generator).item()
                ids.append(token)
                logprobs.append({token: SimpleNamespace(logprob=logits.log_softmax(dim=-1)[token].item())})
            given = tuple(ids), None if sampling.logprobs is None else logprobs
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=given[0], logprobs=given[1])]))
        return outputs
