"""A trial as a script for PEFT alone: the same adapter, optimizer, schedule and rows.

The script needs torch, transformers and peft, and no rsauto. Imported, it has `model`, `optimizer`
and `scheduler`; run, it trains and saves the adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsauto.exports.recipe import Abilities, Recipe
from rsauto.exports.rows import write_json_lines
from rsauto.exports.settings import Written, comment
from rsauto.quantisation import unquantised_modules

ABILITIES = Abilities(
    name="peft", lora_plus=True, lora_plus_decay=True, rank_pattern=True, init_scale=True,
    any_scaling=True, classifiers=True,
)  # fmt: skip

FILE = "train_lora.py"


def write_snippet(recipe: Recipe, folder: Path) -> Written:
    """Writes train_lora.py and the rows."""
    write_json_lines(recipe.chosen.data, folder)
    notes = ["rows are shuffled in another order, so batches are others."]
    if recipe.modules_to_save:
        notes.append("what the checkpoint lacks of the head starts from other random numbers.")
    command = f"python {FILE}"
    parts = [
        comment(recipe, command, notes), _imports(recipe), _model(recipe), _adapter(recipe),
        _optimizer(recipe), _schedule(recipe), _training(recipe),
    ]  # fmt: skip
    (folder / FILE).write_text("\n".join(parts), encoding="utf-8")
    return Written(file=FILE, command=command, notes=tuple(notes))


def _classes(recipe: Recipe) -> tuple[str, ...] | None:
    return recipe.chosen.data.label_names


def _imports(recipe: Recipe) -> str:
    auto = "AutoModelForCausalLM" if _classes(recipe) is None else _CLASSIFIER
    of_transformers = [auto]
    if recipe.record.quant_bits is not None:
        of_transformers.append("BitsAndBytesConfig")
    if recipe.record.optimizer == "adafactor":
        of_transformers.append("Adafactor")
    of_peft = ""
    if _uses_loraplus(recipe):
        of_peft += "from peft.optimizers import create_loraplus_optimizer\n"
    if recipe.modules_to_save:
        of_peft += "from peft.utils import ModulesToSaveWrapper\n"
    return f"""import json
import math
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
{of_peft}\
from torch.nn import functional as F
from transformers import {", ".join(sorted(of_transformers))}
"""


_CLASSIFIER = "AutoModelForSequenceClassification"


def _model(recipe: Recipe) -> str:
    auto = "AutoModelForCausalLM" if _classes(recipe) is None else _CLASSIFIER
    options = {
        "revision": recipe.commit,
        "attn_implementation": recipe.chosen.source.attn_implementation,
    }
    lines = [f"    {name}={value!r},\n" for name, value in options.items() if value is not None]
    lines.insert(0, f"    dtype=torch.{recipe.dtype},\n")
    names = _classes(recipe)
    if names is not None:
        lines.append(f"    id2label={dict(enumerate(names))!r},\n")
        lines.append("    ignore_mismatched_sizes=True,\n")
        lines.append(f"    pad_token_id={recipe.chosen.source.config.pad_token_id!r},\n")
    if recipe.record.quant_bits is not None:
        lines.append("    device_map={'': device},\n    quantization_config=quantisation,\n")
    return f"""
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed({recipe.record.seed})
{_quantisation(recipe)}base = {auto}.from_pretrained(
    {recipe.model!r},
{"".join(lines)})
for module in base.modules():  # the study trained without the base model's own dropout
    for name, value in list(vars(module).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(module, name, 0.0)
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
{_checkpointing(recipe)}"""


def _quantisation(recipe: Recipe) -> str:
    bits = recipe.record.quant_bits
    if bits is None:
        return ""
    import torch

    from rsauto.architecture import auto_class

    with torch.device("meta"):
        source = recipe.chosen.source
        skeleton = auto_class(source.task).from_config(source.config, trust_remote_code=False)
    kept = unquantised_modules(skeleton, recipe.modules_to_save)
    four = f"""
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.{recipe.dtype},""" if bits == 4 else ""  # fmt: skip
    return f"""quantisation = BitsAndBytesConfig(
    load_in_{bits}bit=True,
    llm_int8_skip_modules={kept!r},{four}
)
"""


def _checkpointing(recipe: Recipe) -> str:
    if not recipe.chosen.config.model.gradient_checkpointing:
        return ""
    return """base.config.use_cache = False
base.gradient_checkpointing_enable()
base.enable_input_require_grads()
"""


def _adapter(recipe: Recipe) -> str:
    record = recipe.record
    task = "CAUSAL_LM" if _classes(recipe) is None else "SEQ_CLS"
    options: dict[str, Any] = {
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "use_rslora": recipe.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(recipe.target_modules),
        "rank_pattern": recipe.rank_pattern or None,
        "modules_to_save": list(recipe.modules_to_save) or None,
        "fan_in_fan_out": recipe.fan_in_fan_out or None,
        "task_type": task,
    }
    lines = "".join(f"    {k}={v!r},\n" for k, v in options.items() if v is not None)
    moved = "" if record.quant_bits is not None else ".to(device)"
    return f"""config = LoraConfig(
{lines})
model = get_peft_model(base, config){moved}
{_by_hand(recipe)}"""


def _by_hand(recipe: Recipe) -> str:
    """What LoraConfig has no words for."""
    record = recipe.record
    inner = []
    if not recipe.exact_scaling:
        exponent = record.scaling_exponent
        inner.append(f'        module.scaling["default"] = {record.alpha} * '
                     f'module.r["default"] ** {exponent!r}  # gamma_r\n')  # fmt: skip
    if record.init_scale is not None:
        inner.append(f'        module.lora_A["default"].weight.data *= {record.init_scale!r}\n')
    if record.adapter_dtype == "bfloat16":
        inner.append("        module.lora_A.to(torch.bfloat16)\n")
        inner.append("        module.lora_B.to(torch.bfloat16)\n")
    lines = ""
    if inner:
        lines = 'for module in model.modules():\n    if hasattr(module, "lora_A"):\n'
        lines += "".join(inner)
    if recipe.modules_to_save:
        lines += _HEADS
    return lines


_HEADS = """

def in_float32(_module, args, kwargs):
    def cast(value):
        return value.float() if torch.is_tensor(value) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


for module in model.modules():  # the head is trained in float32, whatever the base model is in
    if isinstance(module, ModulesToSaveWrapper):
        module.modules_to_save.float()
        module.modules_to_save["default"].register_forward_pre_hook(in_float32, with_kwargs=True)
"""


def _uses_loraplus(recipe: Recipe) -> bool:
    # PEFT's gives a classifier's head the rate of A, and its biases that of B.
    return recipe.record.lr_ratio != 1.0 and not recipe.modules_to_save


_OPTIMIZERS = {
    "adamw": ("torch.optim.AdamW", {}),
    "sgd": ("torch.optim.SGD", {}),
    "adafactor": (
        "Adafactor",
        {"scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
}


def _optimizer(recipe: Recipe) -> str:
    record = recipe.record
    name, options = _OPTIMIZERS[record.optimizer]
    others = "".join(f", {key}={value!r}" for key, value in options.items())
    rate, decay = record.learning_rate, record.weight_decay
    if _uses_loraplus(recipe):
        return f"""optimizer = create_loraplus_optimizer(
    model,
    {name},
    lr={rate!r},  # of A; that of B is loraplus_lr_ratio times as large
    loraplus_lr_ratio={record.lr_ratio!r},
    loraplus_weight_decay={decay!r}{others},
)
"""
    if not recipe.modules_to_save:
        return f"""trained = [p for p in model.parameters() if p.requires_grad]
optimizer = {name}(trained, lr={rate!r}, weight_decay={decay!r}{others})
"""
    return f"""groups = {{"A": [], "B": [], "head": []}}
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        part = "head" if ".modules_to_save." in name else "B" if ".lora_B." in name else "A"
        groups[part].append(parameter)
rates = {{"A": {rate!r}, "B": {rate * record.lr_ratio!r}, "head": {record.head_learning_rate!r}}}
optimizer = {name}(
    [{{"params": groups[part], "lr": rates[part]}} for part in groups],
    lr={rate!r},
    weight_decay={decay!r}{others},
)
"""


_DECAY = {
    "constant": "1.0",
    "linear": "1.0 - progress",
    "cosine": "0.5 * (1.0 + math.cos(math.pi * progress))",
}


def _schedule(recipe: Recipe) -> str:
    progress = ""
    if recipe.record.schedule != "constant":
        progress = "    progress = (step - NUM_WARMUP) / max(1, NUM_STEPS - NUM_WARMUP)\n"
    return f"""NUM_STEPS, NUM_WARMUP = {recipe.steps}, {recipe.warmup_steps}


def rate(step):
    if step < NUM_WARMUP:
        return (step + 1) / NUM_WARMUP
{progress}    return {_DECAY[recipe.record.schedule]}


scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
"""


def _training(recipe: Recipe) -> str:
    record = recipe.record
    clip = ""
    if record.max_grad_norm is not None:
        clip = (f"        torch.nn.utils.clip_grad_norm_(model.parameters(), "
                f"{record.max_grad_norm!r})\n")  # fmt: skip
    return f'''BATCH, MICRO_BATCH = {record.batch_size}, {recipe.micro_batch_size}
{_LOSS if _classes(recipe) is None else _CLASS_LOSS}

def padded(rows, name, value):
    """(rows, tokens), filled up on the right."""
    longest = max(len(row[name]) for row in rows)
    return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])


def inputs(rows):
    names = [name for name in rows[0] if name not in ("labels", "label")]
    fill = {{"input_ids": {recipe.chosen.data.pad_token_id}}}
    return {{name: padded(rows, name, fill.get(name, 0)).to(device) for name in names}}


def train(rows):
    model.train()
    order = random.Random({record.seed})
    left = []
    for step in range(NUM_STEPS):
        while len(left) < BATCH:
            left += order.sample(rows, len(rows))
        batch, left = left[:BATCH], left[BATCH:]
        num_targets = sum(map(targets, batch))
        loss = 0.0
        for start in range(0, BATCH, MICRO_BATCH):
            part = summed_loss(batch[start : start + MICRO_BATCH]) / num_targets
            part.backward()
            loss += part.item()
{clip}        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        print(f"step {{step + 1}} of {{NUM_STEPS}}: loss {{loss:.4f}}")


if __name__ == "__main__":
    lines = (Path(__file__).parent / "data" / "train.jsonl").read_text().splitlines()
    train([json.loads(line) for line in lines])
    model.save_pretrained(Path(__file__).parent / "adapter")
'''


_LOSS = '''

def targets(row):
    """Tokens that the loss counts; nothing predicts the first."""
    return sum(label != -100 for label in row["labels"][1:])


def summed_loss(rows):
    logits = model(**inputs(rows)).logits[:, :-1].float()
    labels = padded(rows, "labels", -100)[:, 1:].to(device)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
'''

_CLASS_LOSS = """

def targets(row):
    return 1


def summed_loss(rows):
    labels = torch.tensor([row["label"] for row in rows]).to(device)
    return F.cross_entropy(model(**inputs(rows)).logits.float(), labels, reduction="sum")
"""
