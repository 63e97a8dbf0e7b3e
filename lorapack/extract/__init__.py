"""From a fine-tuned model and its base to an adapter: the difference of the weights, as low-rank pairs."""
