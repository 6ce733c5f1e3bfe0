import math

import numpy as np
import pytest
import torch
from metrics import BitsPerByte, WordPerplexity, make_compute_metrics, token_nats
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed
from windows import EvaluationWindows


VOCABULARY, WINDOW, START = 11, 8, 3


@pytest.fixture(scope="module")
def model():
    set_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, n_positions=WINDOW, initializer_range=0.5, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCABULARY, 61).astype(np.uint8)


@pytest.fixture(scope="module")
def nats_one_by_one(model, tokens):
    """Total nats of the split, one token at a time, each from a context cut by hand."""
    stream = [START, *tokens.tolist()]
    half, total = WINDOW // 2, 0.0
    for position in range(1, len(stream)):
        # The first window predicts all its tokens, every later one the half that is new.
        chunk = 0 if position < WINDOW else (position - WINDOW) // half + 1
        begin = min(chunk * half, len(stream) - WINDOW)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([stream[begin:position]])).logits[0, -1].double()
        total -= logits.log_softmax(0)[stream[position]].item()
    return total


def make_trainer(model, tokens, compute_metrics, folder, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        per_device_eval_batch_size=4,
        **settings,
    )
    return Trainer(
        model=model,
        args=arguments,
        eval_dataset=EvaluationWindows(tokens, WINDOW, START, "valid"),
        data_collator=default_data_collator,
        preprocess_logits_for_metrics=token_nats,
        compute_metrics=compute_metrics,
    )


@pytest.mark.parametrize("batch_eval_metrics", [True, False])
def test_trainer_evaluate_equals_one_token_at_a_time(model, tokens, nats_one_by_one, batch_eval_metrics, tmp_path):
    bits = make_compute_metrics(BitsPerByte(keep_in_memory=True), len(tokens), num_bytes=len(tokens))
    trainer = make_trainer(model, tokens, bits, tmp_path, batch_eval_metrics=batch_eval_metrics)
    assert len(trainer.eval_dataset) % 4 != 0, "the last batch must be a smaller one"
    expected = nats_one_by_one / len(tokens) / math.log(2)
    for _ in range(2):  # the metric starts from nothing each time
        assert trainer.evaluate()["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-6)

    trainer.compute_metrics = make_compute_metrics(WordPerplexity(keep_in_memory=True), len(tokens), num_words=40)
    expected = math.exp(nats_one_by_one / 40)
    assert trainer.evaluate(metric_key_prefix="test")["test_word_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_evaluating_another_split_is_an_error(model, tokens, tmp_path):
    bits = make_compute_metrics(BitsPerByte(keep_in_memory=True), len(tokens), num_bytes=len(tokens))
    trainer = make_trainer(model, tokens[:-1], bits, tmp_path, batch_eval_metrics=True)
    with pytest.raises(ValueError, match="60 tokens were evaluated, but this split has 61"):
        trainer.evaluate()


def test_dropping_the_last_batch_is_an_error(model, tokens, tmp_path):
    bits = make_compute_metrics(BitsPerByte(keep_in_memory=True), len(tokens), num_bytes=len(tokens))
    trainer = make_trainer(model, tokens, bits, tmp_path, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="dataloader_drop_last"):
        trainer.evaluate()


def test_token_nats_stand_at_their_labels():
    logits = torch.randn(2, 5, 7, dtype=torch.bfloat16)
    labels = torch.tensor([[1, 2, 3, 4, 5], [-100, -100, -100, 0, 6]])
    nats = token_nats(logits, labels)
    assert nats.dtype == torch.float32 and nats.shape == labels.shape
    surprise = -logits.float().log_softmax(-1)
    for row, column in [(0, 1), (0, 4), (1, 3), (1, 4)]:
        assert nats[row, column] == pytest.approx(surprise[row, column - 1, labels[row, column]].item(), rel=1e-5)
    assert nats[0, 0] == 0 and torch.all(nats[1, :3] == 0)
    router = (torch.tensor(0.1), logits, (torch.randn(10, 4), torch.randn(10, 4)))  # its loss, and its logits
    assert torch.equal(token_nats(router, labels), nats)


def test_metrics_by_hand():
    nats, counts = [math.log(2) * 6, math.log(2) * 2], [3, 1]
    assert BitsPerByte(keep_in_memory=True).compute(predictions=nats, references=counts) == {"bits_per_byte": 2.0}
    per_byte = BitsPerByte(keep_in_memory=True).compute(predictions=nats, references=counts, num_bytes=16)
    assert per_byte == {"bits_per_byte": 0.5}
    metric = WordPerplexity(keep_in_memory=True)
    metric.add_batch(predictions=nats[:1], references=counts[:1])
    metric.add_batch(predictions=nats[1:], references=counts[1:])
    assert metric.compute(num_words=2)["word_perplexity"] == pytest.approx(16.0)


def test_word_perplexity_of_a_hopeless_model_is_infinite_and_not_an_error():
    hopeless = WordPerplexity(keep_in_memory=True).compute(predictions=[1e5], references=[10], num_words=10)
    assert hopeless["word_perplexity"] == math.inf
