"""What a pruned model may cost: parameters, FLOPs, memory and time, measured and predicted."""
