"""A byte-level Llama (transformers' LlamaForCausalLM), trained for a minute on the standard library's source."""

import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, batches, seeded

LENGTH = 128  # bytes in a sequence
HELD_OUT = 10  # every tenth file is never trained on
STEPS = 800


def build(hidden: int, layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=8 * hidden // 3 // 8 * 8, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, max_position_embeddings=LENGTH, tie_word_embeddings=False, use_cache=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def library_source(limit: int = 3_000_000) -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's top-level modules, sorted by name: (seen in training, held out)."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    seen = b"".join(path.read_bytes() for index, path in enumerate(files) if index % HELD_OUT)
    held_out = b"".join(path.read_bytes() for index, path in enumerate(files) if not index % HELD_OUT)
    return as_bytes(seen[:limit]), as_bytes(held_out)


def as_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def sequences(text: Tensor, count: int, seed: int) -> Tensor:
    """``count`` random excerpts, int64 ``[count, LENGTH]``."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - LENGTH, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(LENGTH)].long()


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(text: Tensor, *, steps: int, seed: int, hidden: int = 128, layers: int = 3, batch: int = 8) -> nn.Module:
    with seeded(seed):
        model = build(hidden, layers)
    data = sequences(text, steps * batch, seed).view(steps, batch, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
    for tokens in data:
        loss = loss_of(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def load(seed: int = 0, steps: int = STEPS) -> Case:
    text, held_out = library_source()
    model = train(text, steps=steps, seed=seed)
    tests = sequences(held_out, 96, seed=1)

    def judge(candidate: nn.Module) -> dict[str, float]:
        nats = [loss_of(candidate, part).item() for part in tests.split(16)]
        return {"bits per byte": sum(nats) / len(nats) / math.log(2)}

    return Case(
        name="byte Llama",
        about=f"LlamaForCausalLM on bytes, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"trained {steps} steps on the standard library's source; bits per byte on files it did not see",
        model=model,
        calibration=batches(sequences(text, 64, seed=2), 16),
        judge=judge,
    )
