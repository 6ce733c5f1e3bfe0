"""Makes a pretrained model sparse, with its dense self as the teacher, and fine-tunes it on a text of yours.

python examples/fine_tune.py MODEL TEXT [STEPS]        e.g. HuggingFaceTB/SmolLM2-135M notes.txt 500
"""

import copy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_topkast import TopKastConfig, TopKastDistillationTrainer, sparsify, sparsity_report


name, text = sys.argv[1:3]
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 500

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)  # values are trained in float32
teacher = copy.deepcopy(model)  # before sparsify: afterwards it would be sparse too

# Windows of 256 tokens; the first 16 also say which weights matter for text like this.
tokens = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
windows = tokens[: len(tokens) // 256 * 256].view(-1, 256)
dataset = [{"input_ids": window, "labels": window, "attention_mask": torch.ones_like(window)} for window in windows]

sparsify(model, TopKastConfig.for_finetuning(0.5), calibration=windows[:16].split(4))
print(sparsity_report(model))

args = TrainingArguments(
    output_dir="runs/fine-tuned",
    max_steps=steps,
    per_device_train_batch_size=4,
    learning_rate=2e-4,  # try half and twice
    warmup_steps=steps // 10,
    lr_scheduler_type="cosine",
    logging_steps=max(1, steps // 10),
    report_to="none",
    dataloader_pin_memory=torch.cuda.is_available(),
)
TopKastDistillationTrainer(model=model, teacher=teacher, args=args, train_dataset=dataset).train()

model.save_pretrained("runs/fine-tuned/model")  # an ordinary checkpoint, with zeros in it
tokenizer.save_pretrained("runs/fine-tuned/model")
