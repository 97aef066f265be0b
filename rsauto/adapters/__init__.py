"""Adapters on a base model: LoRA and rsLoRA, their optimizers, their export. Knows no Optuna."""
