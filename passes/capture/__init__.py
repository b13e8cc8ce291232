"""Capture: from a model and its arguments to a `Captured` graph, by torch.export or by Dynamo."""
