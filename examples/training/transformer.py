"""A small transformer that reads a digit's pixels as 64 tokens, trained by Hugging Face's Trainer with LoRA adapters.

Only the adapters and the classifier travel. `fedflow run examples/training/transformer.yaml`; needs fedflow[huggingface].
"""

import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sites import digits
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fedflow.local.huggingface import HuggingFaceWorkload


def model() -> nn.Module:
    config = BertConfig(
        vocab_size=17,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=10,
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "key", "value", "dense"])
    return get_peft_model(BertForSequenceClassification(config), lora)


def tokens(inputs: torch.Tensor) -> torch.Tensor:
    return (inputs * 16).round().long()


def site(site: str, sites: list[str]) -> HuggingFaceWorkload:
    inputs, labels = digits(site, sites)
    rows = [{"input_ids": x, "labels": y} for x, y in zip(tokens(inputs), labels, strict=True)]

    def trainer(model: Any, config: Any) -> Trainer:
        arguments = TrainingArguments(
            output_dir=tempfile.gettempdir(),
            num_train_epochs=config.epochs,
            per_device_train_batch_size=32,
            learning_rate=0.01,
            seed=config.seed % 2**32,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        return Trainer(model=model, args=arguments, train_dataset=rows)

    return HuggingFaceWorkload(trainer, examples=len(rows))


class HeldOut:
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        inputs, labels = digits()
        logits = model(input_ids=tokens(inputs)).logits
        return {"accuracy": float((logits.argmax(dim=1) == labels).float().mean())}
