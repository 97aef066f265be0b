"""Training one trial, and measuring how good it is. Knows no Optuna."""
