"""The base model in memory, with an adapter's factors attached and exchangeable."""
