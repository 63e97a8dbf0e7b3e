"""What makes PEFT and transformers understand the compact format once lorapack is imported."""
