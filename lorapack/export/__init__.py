"""Export a model with its adapter to ONNX: the graph from the configuration alone, the weights streamed into it."""
