"""Make the embedded model: a 1.2 M parameter Llama, pre-trained on CPython's standard library.

    python -m rsauto.embedded.pretrain --out DIR

1. *Corpus*: the `.py` files of the running interpreter's standard library, in path order
   (`collect_corpus` says which are left out and why). It is on every machine that has Python, its
   licence (PSF-2.0) allows redistribution, and its docstrings mix English with code.
2. *Held-out files*: one file in 28 (3 % of the bytes), chosen by the SHA-256 of its path, so the
   split depends neither on order, nor on a seed, nor on what the other files contain.
3. *Tokenizer*: byte-level BPE, trained on the training files only. No token is added
   automatically: whoever encodes a text appends `<|endoftext|>` where a document ends.
4. *Model*: `LlamaForCausalLM`, tied embeddings, AdamW, linear warm-up then cosine decay to 10 %.
5. *Provenance*: everything above with its hashes goes to `PROVENANCE.json`.

Two runs with the same interpreter, libraries, thread count and processor give the same weights;
another processor may round differently, which is why the weights are shipped and hashed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"

EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "turtledemo", "site-packages", "dist-packages", "encodings"}
)
HELD_OUT_ONE_IN = 28
PROVENANCE_FILE = "PROVENANCE.json"


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Settings of the one run that made the shipped weights."""

    vocab_size: int = 1024
    """Entries of the tokenizer, the two special tokens included."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 512
    max_positions: int = 512

    sequence_tokens: int = 128
    """Length of a training sequence, in tokens."""

    batch_size: int = 16
    """Sequences per optimizer step."""

    num_steps: int = 3600
    """Optimizer steps; 3600 steps are 7.4 M tokens, about two passes over the corpus."""

    peak_lr: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    seed: int = 0
    num_threads: int = 2


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of the corpus."""

    path: str
    """Relative to the standard library's folder, with forward slashes."""

    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file is kept out of training: one in `HELD_OUT_ONE_IN`, by its path alone."""
        return hashlib.sha256(self.path.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def collect_corpus(root: Path) -> list[SourceFile]:
    """Read the standard library's `.py` files below `root`, sorted by path.

    Left out: tests and demos, installed packages, the tables of `encodings` (numbers, not text),
    and `_sysconfigdata*`, which the build writes with the paths of the machine it ran on.
    """
    relative_paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [
        SourceFile(path=path, text=(root / path).read_text(encoding="utf-8"))
        for path in relative_paths
        if EXCLUDED_FOLDERS.isdisjoint(path.split("/"))
        and not path.split("/")[-1].startswith("_sysconfigdata")
    ]


def corpus_sha256(files: Sequence[SourceFile]) -> str:
    """Hash paths and texts in order; lengths are hashed too, so no two corpora run together."""
    digest = hashlib.sha256()
    for file in files:
        for part in (file.path.encode(), file.text.encode()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def train_tokenizer(texts: Sequence[str], config: PretrainConfig) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: every text round-trips, no unknown token is needed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="right",
        model_max_length=config.max_positions,
        clean_up_tokenization_spaces=False,
    )


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, sequence_tokens: int) -> Tensor:
    """Join the texts, each opened by an end-of-text token, and cut into (N, sequence_tokens).

    The rest that does not fill a sequence is dropped.
    """
    token_ids: list[int] = []
    for text in texts:
        token_ids.append(int(tokenizer.eos_token_id))
        token_ids.extend(tokenizer(text, verbose=False)["input_ids"])
    num_sequences = len(token_ids) // sequence_tokens
    return torch.tensor(token_ids[: num_sequences * sequence_tokens]).view(-1, sequence_tokens)


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Randomly initialised Llama with the sizes of `config`."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def lr_factor(step: int, config: PretrainConfig) -> float:
    """Fraction of the peak learning rate at `step`: linear warm-up, cosine decay to one tenth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))


def batches(sequences: Tensor, config: PretrainConfig) -> Iterator[Tensor]:
    """Endless batches (batch_size, sequence_tokens); each pass in a new seeded order."""
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        order = torch.randperm(len(sequences), generator=generator)
        for start in range(0, len(order) - config.batch_size + 1, config.batch_size):
            yield sequences[order[start : start + config.batch_size]]


def train(model: LlamaForCausalLM, sequences: Tensor, config: PretrainConfig) -> float:
    """Train in place and return the mean loss of the last tenth of the steps, in nats per token."""
    # Norm weights are gains around 1: decaying them towards 0 would work against the layer.
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ],
        lr=config.peak_lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step, batch in zip(range(config.num_steps), batches(sequences, config), strict=False):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 200 == 0:
            print(
                f"step {step:5d}  loss {losses[-1]:.3f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
    tail = losses[-max(1, config.num_steps // 10) :]
    return sum(tail) / len(tail)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, sequences: Tensor, batch_size: int = 64) -> float:
    """Cross-entropy over (N, T) sequences, in nats per predicted token."""
    model.eval()
    total = 0.0
    for batch in sequences.split(batch_size):
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return total / len(sequences)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save under the class name that transformers 4 and 5 both know; 5 would write its own."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_provenance(
    out: Path, command: str, facts: dict[str, Any], *, script: str = "rsauto/embedded/pretrain.py"
) -> None:
    """Write `facts`, the libraries and the hash of every file beside it to `PROVENANCE.json`."""
    record = {
        "script": script,
        "command": command,
        **facts,
        "libraries": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "sha256": {
            path.name: file_sha256(path)
            for path in sorted(out.iterdir())
            if path.name != PROVENANCE_FILE
        },
    }
    text = json.dumps(record, indent=2) + "\n"
    (out / PROVENANCE_FILE).write_text(text, encoding="utf-8")


def pretrain(out: Path, config: PretrainConfig) -> None:
    """Make tokenizer, model and provenance record in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)

    files = collect_corpus(Path(sysconfig.get_paths()["stdlib"]))
    train_texts = [file.text for file in files if not file.held_out]
    held_out_texts = [file.text for file in files if file.held_out]
    tokenizer = train_tokenizer(train_texts, config)
    train_sequences = pack(train_texts, tokenizer, config.sequence_tokens)
    held_out_sequences = pack(held_out_texts, tokenizer, config.sequence_tokens)
    print(f"{len(files)} files, {train_sequences.numel()} training tokens")

    model = build_model(config, tokenizer)
    started = time.monotonic()
    train_loss = train(model, train_sequences, config)
    held_out_loss = mean_loss(model, held_out_sequences)
    print(f"held-out loss {held_out_loss:.4f}, perplexity {math.exp(held_out_loss):.2f}")

    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    held_out_bytes = sum(len(text.encode()) for text in held_out_texts)
    write_provenance(
        out,
        f"python -m rsauto.embedded.pretrain --out DIR --steps {config.num_steps}",
        {
            "data": {
                "source": f"standard library of CPython {platform.python_version()}, .py files",
                "licence": "PSF-2.0, https://docs.python.org/3/license.html",
                "excluded_folders": sorted(EXCLUDED_FOLDERS),
                "num_files": len(files),
                "num_bytes": sum(len(file.text.encode()) for file in files),
                "num_held_out_files": len(held_out_texts),
                "held_out_bytes": held_out_bytes,
                "held_out_files": [file.path for file in files if file.held_out],
                "sha256": corpus_sha256(files),
            },
            "python": platform.python_version(),
            "config": vars(config),
            "num_parameters": model.num_parameters(),
            "num_tokens": config.num_steps * config.batch_size * config.sequence_tokens,
            "train_seconds": round(time.monotonic() - started, 1),
            "train_loss": round(train_loss, 4),
            "held_out_loss": round(held_out_loss, 4),
            "held_out_perplexity": round(math.exp(held_out_loss), 2),
            "held_out_bits_per_byte": round(
                held_out_loss * held_out_sequences.numel() / held_out_bytes / math.log(2), 4
            ),
        },
    )


def main() -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Pre-train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--steps",
        type=int,
        default=PretrainConfig.num_steps,
        help="optimizer steps of 2048 tokens (default: %(default)s, about 10 minutes on 2 cores)",
    )
    arguments = parser.parse_args()
    pretrain(arguments.out, PretrainConfig(num_steps=arguments.steps))


if __name__ == "__main__":
    main()
