"""GPU memory of a trial: predicted from a traced step, planned for, and measured afterwards."""
