"""Trains a sparse GPT on bytes, from scratch, on Python's own source: nothing is downloaded.

python examples/pretrain.py [STEPS]
"""

import sys
import sysconfig
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from hf_topkast import TopKastConfig, TopKastTrainer, sparsify, sparsity_report


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400

# The data: 4,000 windows of 128 bytes.
files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
text = torch.tensor(list(b"".join(file.read_bytes() for file in files)[: 4_000 * 128]))
windows = text[: len(text) // 128 * 128].view(-1, 128)
dataset = [{"input_ids": window, "labels": window} for window in windows]

# The model: dense at first, then a fifth of the weights of every projection.
torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=256,
        n_positions=128,
        n_layer=4,
        n_embd=192,
        n_head=4,
        initializer_range=0.05,  # about 0.7 / 192^0.5: GPT-2's own is for models five times as wide
        activation_function="gelu_pytorch_tanh",
        bos_token_id=0,
        eos_token_id=0,
    )
)
sparsify(model, TopKastConfig.for_pretraining(density=0.2))
print(sparsity_report(model))

args = TrainingArguments(
    output_dir="runs/quick-start",
    max_steps=steps,
    per_device_train_batch_size=8,
    learning_rate=8e-3,  # two to four times that of a dense model
    warmup_steps=steps // 10,
    lr_scheduler_type="cosine",
    logging_steps=max(1, steps // 4),
    report_to="none",
    dataloader_pin_memory=torch.cuda.is_available(),
)
TopKastTrainer(model=model, args=args, train_dataset=dataset).train()

prompt = torch.tensor([list(b"    def test_")], device=model.device)
written = model.eval().generate(prompt, max_new_tokens=60, do_sample=True, temperature=0.6)
print(bytes(written[0].tolist()).decode(errors="replace"))
model.save_pretrained("runs/quick-start/model")  # any transformers reader loads it
