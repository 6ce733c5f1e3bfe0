"""Fine-tunes a model that was pruned before (SparseGPT, Wanda, ...): what is zero stays zero.

python examples/keep_pruned.py MODEL TEXT [STEPS]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_topkast import TopKastTrainer, densify, sparsify, sparsity_report


name, text = sys.argv[1:3]
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 500

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
zeros = {key: weight == 0 for key, weight in model.state_dict().items()}

sparsify(model, density="nonzero", method="static", penalty=0)  # method="topkast" lets others take over
report = sparsity_report(model)
print(report)

tokens = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
windows = tokens[: len(tokens) // 256 * 256].view(-1, 256)
args = TrainingArguments(
    output_dir="runs/kept",
    max_steps=steps,
    per_device_train_batch_size=4,
    learning_rate=1e-4,
    warmup_steps=steps // 10,
    lr_scheduler_type="cosine",
    logging_steps=max(1, steps // 10),
    report_to="none",
    dataloader_pin_memory=torch.cuda.is_available(),
)
TopKastTrainer(model=model, args=args, train_dataset=[{"input_ids": w, "labels": w} for w in windows]).train()

densify(model)  # ordinary layers again, for tools that know nothing of this package
weights, kept = model.state_dict(), 0
for name in (f"{row.name}.weight" for row in report.rows):
    if bool((weights[name][zeros[name]] != 0).any()):
        raise SystemExit(f"{name} has lost zeros.")
    kept += int(zeros[name].sum())
print(f"all {kept:,} zeros are still there")
model.save_pretrained("runs/kept/model")
tokenizer.save_pretrained("runs/kept/model")
