"""Tiny GPT-2 and BERT with random weights, trained as people do; facts for the tests to judge.

Each recipe is run by plain Horovod, by Identity and by top-k, on the same batches.
"""

from __future__ import annotations

import copy

import horovod.torch as hvd
import torch
from common import report
from peft import LoraConfig, get_peft_model
from torch_common import digest, flat
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import ef_horovod.torch as ef

STEPS, WORDS, LENGTH, BATCH = 6, 101, 16, 4


def gpt2() -> torch.nn.Module:
    options = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": LENGTH}
    without_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, **options, **without_dropout))


def bert() -> torch.nn.Module:
    options = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(
        vocab_size=WORDS, intermediate_size=128, num_labels=3, **options, **without_dropout
    )
    return BertForSequenceClassification(config)


def lora() -> torch.nn.Module:
    """Two adapter matrices of 64 x 32 and 32 x 192 a layer: large enough to be compressed."""
    config = LoraConfig(r=32, target_modules=["c_attn"], fan_in_fan_out=True)
    return get_peft_model(gpt2(), config)


def bfloat16() -> torch.nn.Module:
    return gpt2().bfloat16()


def checkpointing() -> torch.nn.Module:
    model = gpt2()
    model.gradient_checkpointing_enable()
    return model.train()


def loss_of(model: torch.nn.Module, words: torch.Tensor) -> torch.Tensor:
    """Next word for GPT-2; for BERT a class that follows from the first word."""
    is_bert = "bert" in type(model).__name__.lower()
    labels = words[:, 0] % 3 if is_bert else words
    return model(input_ids=words, labels=labels).loss


def clipped(model, optimizer, words):
    optimizer.zero_grad()
    loss = loss_of(model, words)
    loss.backward()
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    with optimizer.skip_synchronize():
        optimizer.step()
    return loss


def plain(model, optimizer, words):
    optimizer.zero_grad()
    loss = loss_of(model, words)
    loss.backward()
    optimizer.step()
    return loss


def accumulated(model, optimizer, words):
    optimizer.zero_grad()
    for part in words.chunk(2):
        loss = loss_of(model, part) / 2
        loss.backward()
    optimizer.step()
    return loss


def autocast(model, optimizer, words):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, words)
    loss.backward()
    optimizer.step()
    return loss


def compiled(model, optimizer, words):
    optimizer.zero_grad()
    loss = torch.compile(model, backend="eager")(input_ids=words, labels=words).loss
    loss.backward()
    optimizer.step()
    return loss


RECIPES = {
    "gpt2, clipping": (gpt2, clipped),
    "bert, clipping": (bert, clipped),
    "gpt2, accumulation": (gpt2, accumulated),
    "bert, accumulation": (bert, accumulated),
    "gpt2, autocast": (gpt2, autocast),
    "bert, autocast": (bert, autocast),
    "gpt2, checkpointing": (checkpointing, plain),
    "gpt2, torch.compile": (gpt2, compiled),
    "gpt2, LoRA": (lora, plain),
    "gpt2, bfloat16": (bfloat16, plain),
}


def train(start: torch.nn.Module, step, wrap, **options):
    """Losses, and the model in the end."""
    model = copy.deepcopy(start)
    trainable = [p for p in model.parameters() if p.requires_grad]
    passes = 2 if step is accumulated else 1
    optimizer = wrap(
        torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.01),
        named_parameters=model.named_parameters(),
        backward_passes_per_step=passes,
        **options,
    )
    draws = torch.Generator().manual_seed(hvd.rank())
    losses = []
    for _ in range(STEPS):
        words = torch.randint(WORDS, (BATCH, LENGTH), generator=draws)
        losses.append(float(step(model, optimizer, words).detach()))
    return losses, model


def run(name):
    make, step = RECIPES[name]
    torch.manual_seed(0)
    start = make()
    _, identity = train(start, step, ef.DistributedOptimizer)
    ends = {"start": digest(start), "identity": digest(identity)}
    topk = ef.EF21(ef.TopK(ratio=0.05))
    losses, model = train(start, step, ef.DistributedOptimizer, compression=topk)
    ends |= {"top-k": digest(model)}
    found = {"ends": ends, "losses": losses}
    if name != "gpt2, bfloat16":  # which Horovod 0.28.1 cannot sum
        _, horovod = train(start, step, hvd.DistributedOptimizer)
        found["difference"] = float((flat(identity) - flat(horovod)).abs().max())
    return found


def main():
    hvd.init()
    report(hvd.rank(), {name: run(name) for name in RECIPES})


main()
