"""Train, score and export a small mixture-of-experts language model on bytes.

    moe_lm.py                                 # train (resumes)
    moe_lm.py --export                        # write benchmarks/zoo/weights/
    moe_lm.py --evaluate                      # score what ships

Data: the help topics that come with every Python (`pydoc_data.topics`, 0.46 MB of English), topics
in the order of a seeded shuffle. Of the last tenth those paragraphs are held out that do not occur
before: topics repeat each other, and 60 % of it would be known by heart. The model is transformers'
`Qwen3MoeForCausalLM` with 16 experts of which a byte sees 4. Matrices of the blocks are trained by
Muon, all else by AdamW. Every draw of a step comes from a generator seeded by the step, so that a
resumed run goes on as if never stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from safetensors.torch import save_file as save_safetensors
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = Path(__file__).parent / "weights" / "moe_lm.safetensors"
RESULTS = ROOT / "benchmarks" / "results" / "moe_lm.json"

SEED = 0
LENGTH, BATCH = 256, 16
BALANCE = 0.002
"""Weight of the auxiliary balance loss: a larger one makes experts alike."""

MATRIX_RATE, OTHER_RATE, WARMUP, DECAY_SHARE = 2e-3, 1e-3, 100, 0.4
WEIGHT_DECAY, DROPOUT = 0.1, 0.1
SAVE_EVERY = 200
CONFIG: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "router_aux_loss_coef": BALANCE,
    "attention_dropout": DROPOUT,
    "bos_token_id": None,
    "eos_token_id": None,
}


def text() -> tuple[Tensor, Tensor]:
    """Bytes to train on and held out, uint8."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(SEED).shuffle(names)
    data = "\n\n".join(topics[name] for name in names).encode()
    cut = len(data) * 9 // 10
    known = {part.strip() for part in data[:cut].split(b"\n\n")}
    new = [part for part in data[cut:].split(b"\n\n") if part.strip() not in known]
    train, held = (np.frombuffer(t, dtype=np.uint8).copy() for t in (data[:cut], b"\n\n".join(new)))
    return torch.from_numpy(train), torch.from_numpy(held)


def windows(data: Tensor) -> Tensor:
    """Rows ``[n, LENGTH]`` that overlap by half: of each the second half is scored, so that every
    scored byte is scored once, with at least half a window before it."""
    return data.long().unfold(0, LENGTH, LENGTH // 2)


def bigram_perplexity(train: Tensor, held: Tensor) -> float:
    """Of the held-out bytes under the counts of pairs in training, each a tenth more than seen."""
    counts = torch.full((256, 256), 0.1, dtype=torch.float64)
    pairs = train.long()
    counts.view(-1).index_add_(
        0, pairs[:-1] * 256 + pairs[1:], torch.ones(len(pairs) - 1, dtype=torch.float64)
    )
    share = (counts / counts.sum(1, keepdim=True)).log()
    held = held.long()
    return math.exp(-share[held[:-1], held[1:]].mean().item())


@torch.no_grad()
def perplexity(model: Qwen3MoeForCausalLM, data: Tensor) -> float:
    """Per byte of the scored halves of `windows`."""
    total, count = 0.0, 0
    for rows in windows(data).split(32):
        logits = model(rows, use_cache=False).logits[:, LENGTH // 2 - 1 : -1].float()
        truth = rows[:, LENGTH // 2 :]
        total += F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="sum").item()
        count += truth.numel()
    return math.exp(total / count)


def build() -> Qwen3MoeForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG))


def rate(step: int, steps: int) -> float:
    """Share of the peak: linear warm-up, constant, linear decay over the last `DECAY_SHARE`."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY_SHARE * steps))


def optimizers(model: Qwen3MoeForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if "layers" in name and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in named.values() if id(p) not in chosen]
    muon = torch.optim.Muon(
        matrices, MATRIX_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        others, OTHER_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
    )
    return [(muon, MATRIX_RATE), (adamw, OTHER_RATE)]


def train(folder: Path, steps: int) -> None:
    """Train from the checkpoint in `folder` where there is one, up to `steps`."""
    data, held = text()
    model = build().train()
    model.set_experts_implementation("eager")  # twice as fast as the default with a backward
    pairs = optimizers(model)
    start, path = 0, folder / "checkpoint.pt"
    if path.exists():
        checkpoint = torch.load(path)
        start = checkpoint["step"]
        model.load_state_dict(checkpoint["model"])
        for (optimizer, _), state in zip(pairs, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    losses: list[float] = []
    began = time.perf_counter()
    for step in tqdm(range(start, steps), initial=start, total=steps, mininterval=20):
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        places = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator)
        rows = torch.stack([data[p : p + LENGTH] for p in places.tolist()]).long()
        torch.manual_seed(step)
        out = model(rows, labels=rows, output_router_logits=True, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in pairs:
            optimizer.param_groups[0]["lr"] = peak * rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(out.loss.item())
        done = step + 1
        if done % 100 == 0:
            pace = (done - start) / (time.perf_counter() - began)
            tqdm.write(f"step {done} loss {np.mean(losses):.4f} steps/s {pace:.2f}")
            losses.clear()
        if done % SAVE_EVERY == 0 or done == steps:
            model.eval()
            tqdm.write(f"step {done} held-out perplexity {perplexity(model, held):.3f}")
            model.train()
            checkpoint = {
                "step": done,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer, _ in pairs],
            }
            torch.save(checkpoint, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)


def load_moe_lm(path: Path = WEIGHTS) -> Qwen3MoeForCausalLM:
    """The shipped model (fp16 on disk) in fp32 on the CPU."""
    model = build().eval()
    state = {name: t.float() for name, t in load_file(path).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise ValueError(f"{path}: {missing} missing, {unexpected} not expected")
    return model


def export(folder: Path) -> None:
    checkpoint = torch.load(folder / "checkpoint.pt")
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "seed": str(SEED),
        "training_steps": str(checkpoint["step"]),
        "script": "benchmarks/zoo/moe_lm.py",
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "data_licence": "Python documentation, PSF License Version 2",
        "python": platform.python_version(),
    }
    halves = {
        name: t.half().contiguous()
        for name, t in checkpoint["model"].items()
        if name != "lm_head.weight"
    }
    save_safetensors(halves, WEIGHTS, metadata=metadata)


def evaluate() -> dict[str, Any]:
    data, held = text()
    model = load_moe_lm()
    full = perplexity(model, held)
    experts = {}
    for count in (3, 2, 1):
        for layer in model.model.layers:
            layer.mlp.gate.top_k = count
        experts[count] = perplexity(model, held)
    pair = bigram_perplexity(data, held)
    return {
        "held_out_perplexity": round(full, 4),
        "bigram_perplexity": round(pair, 4),
        "of_bigram": round(full / pair, 4),
        "perplexity_with_fewer_experts": {str(k): round(v, 4) for k, v in experts.items()},
        "held_out_bytes": len(held),
        "training_bytes": len(data),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "moe_lm")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate", action="store_true", help="score what ships, write JSON")
    parser.add_argument("--export", action="store_true", help="write the weights that ship")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.export:
        export(options.folder)
    if options.evaluate:
        scores = evaluate()
        print(json.dumps(scores, indent=2))
        RESULTS.write_text(json.dumps(scores, indent=2) + "\n")
    if not (options.export or options.evaluate):
        options.folder.mkdir(parents=True, exist_ok=True)
        train(options.folder, options.steps)


if __name__ == "__main__":
    main()
