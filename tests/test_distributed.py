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

"""Runs of two processes on the CPU (gloo), against the same run of one process."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from conftest import callback_of, first_losses, make_args, make_dataset, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_spin import SelfPlayCallback, SPINTrainer, memory
from trl_spin.iterations import BestMetric
from trl_spin.run.checkpoints import save_model
from trl_spin.run.games import load_game, read_manifest, read_sft
from trl_spin.run.weights import weights_fingerprint


def by_length(prompts, completions, real):
    return [1 + len(message["content"]) % 2 / 2 for [message] in completions]


def play(output_dir, kind: str, batch_size: int, model=None, resume=None, callbacks=None, **options):
    tokenizer = make_tokenizer()
    if kind == "vllm":  # two processes share one
        parallel = int(os.environ.get("WORLD_SIZE", 1))
        options |= {"use_vllm": True, "vllm_python": sys.executable, "vllm_tensor_parallel_size": parallel}
    trainer = SPINTrainer(
        model or make_model(tokenizer),
        args=make_args(
            output_dir,
            per_device_train_batch_size=batch_size,
            max_completion_length=60,
            # Pairs that are not played fall on the processes unevenly
            truncated_completions="drop" if kind == "full" else "keep",
            **{
                "opponent_history": 1,
                "optim": "sgd",  # Adam would blow rounding up to the size of the learning rate
                "learning_rate": 1e-2,
                "generation_token_budget": 400,
            }
            | options,
        ),
        train_dataset=make_dataset(16),
        eval_dataset=make_dataset(5),
        processing_class=tokenizer,
        callbacks=callbacks,
        pair_filter=by_length if kind == "full" else None,
        peft_config=LoraConfig(r=1 if model else 4, target_modules="all-linear") if kind == "lora" else None,
    )
    trainer.train(resume)
    return trainer


def run(launcher: str, *arguments, **environment) -> str:
    """This file on two processes. Returns what they said."""
    result = subprocess.run(
        [sys.executable, "-m", *launcher.split(), __file__, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "iteration-1").glob("*.safetensors")))


def assert_same_game(one: Path, two: Path, iteration: int) -> dict[str, Dataset]:
    one, two = (load_game(str(path), iteration) for path in (one, two))
    for name in ("train", "eval"):
        for pair, other in zip(one[name], two[name], strict=True):
            logps = [(p.pop("ref_real_logps"), p.pop("ref_generated_logps")) for p in (pair, other)]
            assert pair == other
            assert logps[0] == pytest.approx(logps[1], abs=1e-3)
    return one


@pytest.mark.parametrize("kind", ["full", "lora", "vllm"])
def test_two_processes_play_the_same_game_as_one(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).with_name("stand_in")), prepend=os.pathsep)  # for vLLM
    play(tmp_path / "one", kind, batch_size=4, compare_sft=[1e-2] if kind in BEST else None)
    run("torch.distributed.run --standalone --nproc_per_node 2", tmp_path / "two", kind, ACCELERATE_USE_CPU="true")
    first, second = (json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    if kind == "lora":
        assert first[0] and first[1] < memory.DEFAULT_BUDGET
    for iteration in range(2):
        one = assert_same_game(tmp_path / "one", tmp_path / "two", iteration)
        # A sampler of two processes repeats one of the five rows
        paths = (tmp_path / run / f"self_play/iteration-{iteration}/examples.json" for run in ("one", "two"))
        margins = [{e["row"]: e["margin"] for e in json.loads(path.read_text())["examples"]} for path in paths]
        assert len(margins[0]) == 5 and margins[0] == pytest.approx(margins[1], abs=1e-3)
        played = one["train"]["played"][:]
        assert all(played) if kind != "full" else 0 < sum(played) < len(played)
    one, two = (trained(tmp_path / run) for run in ("one", "two"))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)
    if kind in BEST:
        [one], [two] = (read_sft(tmp_path / run) for run in ("one", "two"))
        assert one["eval_nll/real"] == pytest.approx(two.pop("eval_nll/real"), abs=1e-3)
        assert two.items() <= one.items()


# ---- Models that are spread over the processes ----

CONFIGS = Path(trl.__file__).parent / "accelerate_configs"
# Without the threshold, every process would keep all weights of so small a model
ZERO_3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
ENGINES = {
    "zero1": f"--config_file {CONFIGS}/zero1.yaml",
    "zero3": "--use_deepspeed --zero3_init_flag true --deepspeed_config_file {dir}/zero3.json",
    "fsdp2": f"--config_file {CONFIGS}/fsdp2.yaml",
}
SHARDED = {"optim": "adamw_torch", "adam_epsilon": 1e-3, "learning_rate": 1e-3, "opponent_history": 0}


BEST = {"full": -1, "lora": 0}  # the iterations that are taken for the best


def local(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The part of a parameter that this process has."""
    return getattr(parameter, "ds_tensor", parameter.to_local() if isinstance(parameter, DTensor) else parameter)


class Poison(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            local([p for p in model.parameters() if p.requires_grad][-1]).data.fill_(float("nan"))


def play_sharded(directory: str, engine: str):
    """The games of one of two processes, and what the parent is told of them."""
    if engine == "fsdp2":  # which accelerate 1.15 has for GPUs only
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
    directory, find_best, facts = Path(directory), BestMetric.find_best, {}
    options = SHARDED | {"model": f"{directory}/start", "batch_size": 4, "use_cpu": False, "ddp_backend": "gloo"}
    for kind, best in BEST.items():
        options |= {"gradient_checkpointing": kind == "lora", "save_strategy": "steps", "save_steps": 3}
        os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT" if kind == "full" else "SHARDED_STATE_DICT"
        BestMetric.find_best = lambda self, last, best=best: best
        trainer = play(directory / kind, kind, load_best_iteration_at_end=True, **options)
        save_model(trainer, directory / f"{kind}-best")
        BestMetric.find_best = find_best
        weights = [(local(p).numel(), getattr(p, "ds_numel", p.numel())) for p in trainer.model.parameters()]
        share = sum(here for here, _ in weights) / sum(everywhere for _, everywhere in weights)
        facts[kind] = {"losses": first_losses(trainer), "share": share}

        def kill(run=directory / kind, killed=directory / f"{kind}-killed"):
            shutil.copytree(run, killed)
            for path in ("checkpoint-4", "iteration-1"):
                shutil.rmtree(killed / path)

        trainer.processes.on_main(kill)  # in the middle of the last iteration
        play(directory / f"{kind}-killed", kind, resume=True, **options)
    if engine == "fsdp2":
        options |= {"model_init_kwargs": {"dtype": "bfloat16"}, "learning_rate": 1e-7}
    with pytest.raises(ValueError, match="After step 2 .* weights are not finite"):
        play(directory / "poisoned", "full", callbacks=[Poison()], **options)
    return trainer, facts


def test_a_fingerprint_is_that_of_the_weights_alone(tmp_path):
    trainer = make_trainer(tmp_path, dry_run=True, torch_compile=True, torch_compile_backend="eager")
    accelerator, model, expected = trainer.accelerator, trainer.model, trainer._start_fingerprint
    trainer.train()
    assert trainer.model_wrapped is not model and weights_fingerprint(accelerator, trainer.model_wrapped) == expected
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert weights_fingerprint(accelerator, model) == expected
    empty, more = (torch.nn.ParameterList([torch.empty(0, columns)]) for columns in (2, 3))  # as a process may have it
    assert weights_fingerprint(accelerator, empty) != weights_fingerprint(accelerator, more)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A model, and the games of one process that starts from it."""
    path = tmp_path_factory.mktemp("one")
    make_model(make_tokenizer()).save_pretrained(path / "start")
    for kind in ("full", "lora"):
        play(path / kind, kind, batch_size=8, model=f"{path}/start", **SHARDED)
    return path


@pytest.mark.parametrize("engine", ENGINES)
def test_sharded_models_play_the_same_game(tmp_path, one_process, engine):
    if engine != "fsdp2":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (`.ci/run` says how)")
    shutil.copytree(one_process / "start", tmp_path / "start")
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO_3))
    launcher = "accelerate.commands.launch --num_processes 2 --mixed_precision no --main_process_port 0"
    log = run(f"{launcher} {ENGINES[engine].format(dir=tmp_path)}", tmp_path, engine, DS_ACCELERATOR="cpu")
    first, second = (json.loads((tmp_path / f"{engine}-{rank}.json").read_text()) for rank in range(2))
    for kind, best in BEST.items():
        assert first[kind]["losses"] == second[kind]["losses"] == pytest.approx([math.log(2)] * 2, abs=1e-5)
        shares = [facts[kind]["share"] for facts in (first, second)]
        assert shares == ([1, 1] if engine == "zero1" else pytest.approx([0.5, 0.5], abs=0.02))
        for iteration in range(2):
            assert_same_game(one_process / kind, tmp_path / kind, iteration)
        one, two, resumed = (
            trained(path) for path in (one_process / kind, tmp_path / kind, tmp_path / f"{kind}-killed")
        )
        torch.testing.assert_close(one, two, atol=2e-5, rtol=0)
        torch.testing.assert_close(two, resumed, atol=0, rtol=0)
        # One process finds the same hash, of what was kept and of what was returned to
        for iteration, path in ((0, tmp_path / kind / "iteration-0"), (best, tmp_path / f"{kind}-best")):
            opponent = read_manifest(str(tmp_path / kind), iteration + 1)["opponent"]["fingerprint"]
            model = AutoModelForCausalLM.from_pretrained(path if kind == "full" else tmp_path / "start")
            model = PeftModel.from_pretrained(model, path) if kind == "lora" else model
            assert weights_fingerprint(Accelerator(cpu=True), model) == opponent
    assert not list((tmp_path / "poisoned").glob("*-*"))
    assert engine != "fsdp2" or "round away for 100% of the weights" in log


if __name__ == "__main__":
    if sys.argv[2] in ENGINES:
        trainer, result = play_sharded(*sys.argv[1:])
        name = Path(sys.argv[1], sys.argv[2])
    else:
        kind, options, name = sys.argv[2], {}, sys.argv[1]
        if kind == "lora":  # one of the processes has little memory, and both must do as it needs
            memory.available_memory = lambda device: 1e6 if os.environ["RANK"] == "1" else 1e12
            options = {"gradient_checkpointing": None, "generation_token_budget": None}
        options["compare_sft"] = [1e-2] if kind in BEST else None
        trainer = play(name, kind, batch_size=2, **options)
        engine = callback_of(trainer, SelfPlayCallback).engine
        result = trainer.model.is_gradient_checkpointing, engine.token_budget
    Path(f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()  # a process that left before the other was done would be aborted
    trainer.accelerator.end_training()
