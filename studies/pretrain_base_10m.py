"""Make studies/base-10m: a 9.8 M parameter Llama, pre-trained on documentation from PyPI.

    python studies/pretrain_base_10m.py --out DIR

The embedded model (hidden size 128) is too narrow to tell a rank of 64 from full fine-tuning. This
one has hidden size 384, so that ranks 4 to 256 are all low ranks of its layers.

1. *Corpus*: the `.rst`, `.txt` and `.md` files of the documentation folders of ten source
   distributions, fetched from PyPI and checked against the SHA-256 in `SOURCES`. All ten licences
   allow redistribution (BSD, MIT, PSF-like); the prose is English, with Python in between.
2. *Held-out files*: one in 28 by the SHA-256 of its path, as for the embedded model.
3. *Tokenizer, model and training*: those of `rsauto.embedded.pretrain`, at the sizes of `BASE`.
   The tokens seen are a little less than one pass over the corpus, so no text is repeated.
4. *Weights*: trained in float32, stored in bfloat16 (20 MB); the held-out loss is measured on the
   stored weights. `PROVENANCE.json` has it beside every hash.

It took 1 h 50 min on one busy core. The same processor, thread count and libraries give the same
bytes; another processor rounds differently, so the weights are kept in the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import tarfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch

from rsauto.embedded.pretrain import (
    PretrainConfig,
    SourceFile,
    build_model,
    corpus_sha256,
    mean_loss,
    pack,
    save_tokenizer,
    train,
    train_tokenizer,
    write_provenance,
)

BASE = PretrainConfig(
    vocab_size=2560,
    hidden_size=384,
    num_layers=5,
    num_heads=6,
    intermediate_size=1024,
    max_positions=1024,
    sequence_tokens=256,
    batch_size=16,
    num_steps=1800,
    peak_lr=2e-3,
    num_threads=1,
)
TEXT_SUFFIXES = (".rst", ".txt", ".md")
DOCUMENTATION = frozenset({"doc", "docs"})
PYPI_FILES = "https://files.pythonhosted.org/packages"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source distribution on PyPI."""

    path: str
    """Below `PYPI_FILES`."""
    sha256: str
    licence: str


SOURCES = (
    Source(
        path="55/79/49a609ea76ec51404b482932e33f1e6858946b920232c11b11a25bea3032/django-6.1.3.tar.gz",
        sha256="b5d2d9e35295065d13b1927b3f19a59bd119f737aa6299def14ccca1ae3c8c0d",
        licence="BSD-3-Clause",
    ),
    Source(
        path="74/9a/8d798711d1e56fa5f51152c228c2e0a8f03c95f3d59c969dd720ed492b83/sqlalchemy-2.0.58.tar.gz",
        sha256="2acdcec9836b7c1514a9ad426e7731669a1186d96481a2e82c50bf2aebb49061",
        licence="MIT",
    ),
    Source(
        path="4e/3a/8770c288c47f0b5c2a786d3c20e79f66fd245f2d42cd232d7cd5e00e83e5/numpy-2.5.5.tar.gz",
        sha256="5cddc243c75114ba845f01b1f87aca1572dbf7b6c2d88636ed3e1d2bccd7f1bf",
        licence="BSD-3-Clause",
    ),
    Source(
        path="d2/eb/eaf5e07fcc0da7149b0e084f24e54edd7441b9a89ce7e034032ae97fe3a0/scikit_learn-1.9.1.tar.gz",
        sha256="629cada3e33e2b9bf376cdc7614a47a4140b8aedc1d836579e359736fbd82977",
        licence="BSD-3-Clause",
    ),
    Source(
        path="df/17/1747b4154034befd0ed33b52538f5eb7752d05bb51c5e2a31470c3bc7d52/matplotlib-3.9.4.tar.gz",
        sha256="1e00e8be7393cbdc6fedfa8a6fba02cf3e83814b285db1c60b906a023ba41bc3",
        licence="PSF-like",
    ),
    Source(
        path="95/57/02089e6da0fc00846d309034ad74e13ebcadc67b1c5cef397ae0597473fa/astropy-8.0.2.tar.gz",
        sha256="e6af35823099ad6a40b57dbe5ff845f577374ea131925c9fa4b49eeab06c5310",
        licence="BSD-3-Clause",
    ),
    Source(
        path="ef/f7/166bfd22cbd0dd4f77715ddd207881c1332cd1f304d79b1a123aff7cdf10/celery-5.7.0.tar.gz",
        sha256="6a5dfcf6662287204f009a02002b9e66c83d4105e47ebabdc7079108772fc6f0",
        licence="BSD-3-Clause",
    ),
    Source(
        path="fe/31/a5f99ae7f1550914b0702b8f78118d95a79da20525d26fbc1b2ab42bc8ae/twisted-26.10.0.tar.gz",
        sha256="5f0355403e507fc23ceea85e9dbb4bc59335aabde41dd324e8b8cea180dd38de",
        licence="MIT",
    ),
    Source(
        path="64/d4/413466f0be8b1cb0e3e43893a148b96d7462d0923d82b4166b21afc5f30c/sphinx-9.2.0.tar.gz",
        sha256="90470459f3cab15d9dfed146c71cf77694b0445df17b2e0e69059cb9f7fc9ee4",
        licence="BSD-2-Clause",
    ),
    Source(
        path="eb/b0/7da031ff0ce073839984097724db2c54e8c4b7938acb9ef4691a98620ce7/Scrapy-2.9.0.tar.gz",
        sha256="564c972b56e54b83141f395ce3f6a25bfe2093d61d13f9b81d05384e19db98da",
        licence="BSD-3-Clause",
    ),
)


def fetch(source: Source, cache: Path) -> bytes:
    """The distribution's bytes, from `cache` where they are. Raises SystemExit on a wrong hash."""
    path = cache / source.path.rsplit("/", 1)[-1]
    if not path.exists():
        with urllib.request.urlopen(f"{PYPI_FILES}/{source.path}", timeout=300) as answer:
            path.write_bytes(answer.read())
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != source.sha256:
        raise SystemExit(f"{path}: SHA-256 is {found}, expected {source.sha256}; delete the file")
    return data


def documentation(data: bytes) -> list[SourceFile]:
    """Text files below the top-level doc or docs folder of a .tar.gz, sorted by path."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = sorted(archive.getmembers(), key=lambda member: member.name)
        return [
            SourceFile(path=member.name, text=stream.read().decode("utf-8", errors="replace"))
            for member in members
            if member.isfile()
            and member.name.endswith(TEXT_SUFFIXES)
            and member.name.split("/")[1] in DOCUMENTATION
            and (stream := archive.extractfile(member)) is not None
        ]


def pretrain(out: Path, cache: Path, config: PretrainConfig) -> None:
    """Make tokenizer, model and provenance record in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)

    files = [file for source in SOURCES for file in documentation(fetch(source, cache))]
    train_texts = [file.text for file in files if not file.held_out]
    held_out_texts = [file.text for file in files if file.held_out]
    tokenizer = train_tokenizer(train_texts, config)
    train_sequences = pack(train_texts, tokenizer, config.sequence_tokens)
    held_out_sequences = pack(held_out_texts, tokenizer, config.sequence_tokens)
    print(f"{len(files)} files, {train_sequences.numel()} training tokens", flush=True)

    model = build_model(config, tokenizer)
    started = time.monotonic()
    train_loss = train(model, train_sequences, config)
    seconds = time.monotonic() - started
    stored = model.to(torch.bfloat16)
    stored.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    held_out_loss = mean_loss(stored.float(), held_out_sequences)
    held_out_bytes = sum(len(text.encode()) for text in held_out_texts)
    print(f"held-out loss {held_out_loss:.4f}, perplexity {math.exp(held_out_loss):.2f}")
    write_provenance(
        out,
        f"python studies/pretrain_base_10m.py --out DIR --steps {config.num_steps}",
        {
            "data": {
                "source": "documentation folders of source distributions on PyPI",
                "distributions": [vars(source) for source in SOURCES],
                "num_files": len(files),
                "num_bytes": sum(len(file.text.encode()) for file in files),
                "num_held_out_files": len(held_out_texts),
                "held_out_bytes": held_out_bytes,
                "sha256": corpus_sha256(files),
            },
            "config": vars(config),
            "num_parameters": model.num_parameters(),
            "num_corpus_tokens": train_sequences.numel(),
            "num_tokens": config.num_steps * config.batch_size * config.sequence_tokens,
            "train_seconds": round(seconds, 1),
            "train_loss": round(train_loss, 4),
            "held_out_loss": round(held_out_loss, 4),
            "held_out_perplexity": round(math.exp(held_out_loss), 2),
            "held_out_bits_per_byte": round(
                held_out_loss * held_out_sequences.numel() / held_out_bytes / math.log(2), 4
            ),
        },
        script="studies/pretrain_base_10m.py",
    )


def main() -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Pre-train the base model of the studies.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/pypi"), help="downloads (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=BASE.num_steps, help="optimizer steps")
    arguments = parser.parse_args()
    settings = {**vars(BASE), "num_steps": arguments.steps}
    pretrain(arguments.out, arguments.cache, PretrainConfig(**settings))


if __name__ == "__main__":
    main()
