"""A run whose server dies stops with a checkpoint, and goes on from it with a server that was started again."""

import subprocess
import sys
import threading
import time

import fork_server
import torch
from vllm_of_tests import Server, needs_vllm, write_model

pytestmark = needs_vllm

CONFIG = """
seed_everything: 0
model:
  model: {model}
  loss: GRPOLoss
  reward: ExactMatch
  correction: TokenTruncation
  sampler:
    class_path: VLLMServerSampler
    init_args: {{max_new_tokens: 16, urls: [{url}], give_up_after: 3, timeout: 20}}
  rollouts_ahead: 2
  prompts_per_rollout: 4
  samples_per_prompt: 4
  eval_samples: 2
data:
  source: {{class_path: FileSource, init_args: {{train: {sums}}}}}
  format: PlainFormat
adapter: {{rank: 2, calibration_prompts: 4, budget: {{class_path: ModuleBudget, init_args: {{share: 0.2}}}}}}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: {steps}
  logger: {{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {{save_dir: {root}, name: run}}}}
"""


def command(*arguments):
    return [sys.executable, "-m", "hybrid_lightning", "fit", *map(str, arguments)]


def test_a_run_stops_with_a_checkpoint_when_its_server_dies_and_goes_on_with_a_new_one(tmp_path):
    model = write_model(tmp_path / "model")
    # Rewards are all equal to 0 without it: the answer to each is its first character.
    sums = tmp_path / "sums.jsonl"
    sums.write_text("\n".join(f'{{"question": "{i}+{j}=", "answer": "{i}"}}' for i in range(8) for j in range(8)))
    server = Server(model, tmp_path / "log.txt")
    try:
        config = tmp_path / "config.yaml"
        config.write_text(CONFIG.format(model=model, url=server.url, sums=sums, root=tmp_path, steps=400))
        run = fork_server.Forked(command("--config", config), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(run.stdout))
        reader.start()
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/*/plan.json")):
            assert run.poll() is None and time.monotonic() < deadline, "".join(lines)
            time.sleep(0.2)
        time.sleep(3)  # some steps
        server.stop()
        run.wait(timeout=120)
        reader.join()
        output = "".join(lines)
        checkpoints = list(tmp_path.glob("run/version_0/checkpoints/stopped.ckpt"))
        assert run.returncode == 1 and checkpoints, output
        assert server.url in output and "Checkpoint saved. Go on with" in output
        server.start()
        made = torch.load(checkpoints[0], weights_only=False)["global_step"]
        resumed = ("--config", tmp_path / "run/version_0/config.yaml", "--ckpt_path", checkpoints[0])
        line = command(*resumed, f"--trainer.max_steps={made + 2}")
        again = fork_server.run(line, capture_output=True, text=True, timeout=300)
        assert again.returncode == 0, again.stdout + again.stderr
        ended = torch.load(tmp_path / "run/version_1/checkpoints/last.ckpt", weights_only=False)
        assert ended["global_step"] == made + 2
    finally:
        server.stop()
